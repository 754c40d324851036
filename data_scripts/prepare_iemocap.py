"""Prepare IEMOCAP (audio, video, text; 4 emotions) from its full release.

    python data_scripts/prepare_iemocap.py --root IEMOCAP_full_release --split session=5
    python data_scripts/prepare_iemocap.py --root IEMOCAP_full_release --split train.txt test.txt --variant published
    python data_scripts/prepare_iemocap.py --root IEMOCAP_full_release --faces whole --variant whole
    python data_scripts/prepare_iemocap.py --miniature

Doing it twice does nothing; if it was killed, the same command goes on where it stopped.
"""

from mla_nb.data.iemocap import prepare_iemocap
from mla_nb.data.media import media_main
from mla_nb.data.miniature import miniature

if __name__ == "__main__":
    media_main(
        "iemocap",
        __doc__,
        prepare_iemocap,
        miniature,
        ", 'session=5' (or 1 to 4: that session is the test split)",
        faces=(
            "speaker",
            "'speaker' (that half of the picture), 'whole', or 'none' (no video)",
        ),
    )
