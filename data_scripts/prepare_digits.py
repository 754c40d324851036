"""Prepare the digits dataset: spoken digits (Free Spoken Digit Dataset) paired with scikit-learn's handwritten ones.

    python data_scripts/prepare_digits.py --archive free-spoken-digit-dataset.zip
    python data_scripts/prepare_digits.py --root free-spoken-digit-dataset --split speaker
    python data_scripts/prepare_digits.py --download --split speaker --image_noise 0.5 --n_train 800

The options decide the folder below --data: data/digits, data/digits-speaker, data/digits-speaker-noise0.5-n800, ...
Doing it twice does nothing; if it was killed, the same command goes on where it stopped.
"""

import argparse
import sys
from pathlib import Path

from mla_nb.core import InputError
from mla_nb.data.digits import (
    CONTENT,
    content_sha,
    download,
    miniature,
    prepare_digits,
    read_archive,
    read_root,
)


def main(argv=None):
    p = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    where = p.add_mutually_exclusive_group(required=True)
    where.add_argument(
        "--archive", metavar="FILE.zip", help="the archive of the dataset's repository"
    )
    where.add_argument("--root", metavar="DIR", help="an unpacked clone of it")
    where.add_argument(
        "--download",
        action="store_true",
        help="fetch the published archive (16 MB) and check it",
    )
    where.add_argument(
        "--miniature",
        action="store_true",
        help="make telephone tones instead of using recordings",
    )
    p.add_argument(
        "--split",
        default="official",
        help="'official', or 'speaker': two voices that are not in training (default: official)",
    )
    p.add_argument(
        "--snr",
        type=float,
        help="add noise to the sound at this signal-to-noise ratio, dB",
    )
    p.add_argument(
        "--image_noise",
        type=float,
        default=0.0,
        help="add noise of this sd to the images, 0 to 1",
    )
    p.add_argument(
        "--occlusion",
        type=float,
        default=0.0,
        help="hide a square of this share of the image's side, 0 to 1",
    )
    p.add_argument("--n_train", type=int, help="keep only so many training samples")
    p.add_argument(
        "--pairing", type=int, default=0, help="seed of pairing, noise and choice"
    )
    p.add_argument(
        "--data",
        default="data",
        metavar="DIR",
        help="where prepared datasets live (default: data)",
    )
    p.add_argument("--out", metavar="DIR", help="a folder of its own instead")
    p.add_argument(
        "--force",
        action="store_true",
        help="replace a dataset that was prepared differently",
    )
    a = p.parse_args(argv)
    try:
        if a.miniature and a.data == "data" and not a.out:
            raise InputError(
                "--miniature: give a folder of its own with --data DIR, so that tones are never taken for recordings."
            )
        if a.root is not None:
            recordings = read_root(a.root)
        elif a.archive is not None:
            recordings = read_archive(a.archive)
        else:
            cache = Path(a.data) / "raw"
            cache.mkdir(parents=True, exist_ok=True)
            recordings = read_archive(
                download(cache / "fsdd.zip")
                if a.download
                else miniature(cache / "tones.zip")
            )
        out = prepare_digits(
            recordings,
            a.data,
            a.out,
            a.force,
            split=a.split,
            snr=a.snr,
            image_noise=a.image_noise,
            occlusion=a.occlusion,
            n_train=a.n_train,
            pairing=a.pairing,
        )
    except InputError as e:
        sys.exit(f"prepare_digits: {e}")
    except OSError as e:
        sys.exit(
            f"prepare_digits: cannot read or write {e.filename}: {e.strerror}; choose another --data or --out, or make room there"
        )
    except KeyboardInterrupt:
        sys.exit("prepare_digits: stopped; the same command goes on where it stopped")
    if not a.miniature and content_sha(recordings) != CONTENT:
        print(
            f"note: these are {len(recordings)} recordings that differ from the 3,000 published ones; dataset.json says so"
        )
    print(f"ready: {out}")


if __name__ == "__main__":
    main()
