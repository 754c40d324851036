"""Prepare MVSA-Single (image, text; positive, neutral, negative) from its unpacked download: data/ and labelResultAll.txt.

    python data_scripts/prepare_mvsa.py --root MVSA_Single
    python data_scripts/prepare_mvsa.py --root MVSA_Single --split train.jsonl dev.jsonl test.jsonl
    python data_scripts/prepare_mvsa.py --root MVSA_Single --labels resolve --variant resolve
    python data_scripts/prepare_mvsa.py --miniature

Doing it twice does nothing; if it was killed, the same command goes on where it stopped.
"""

from mla_nb.data.media import media_main
from mla_nb.data.miniature import miniature
from mla_nb.data.mvsa import prepare_mvsa

LABELS = "'agree' keeps the samples whose text and image have one label; 'resolve' lets a neutral one give way to the other and drops opposites"
INCOMPLETE = "what to do with an image without text, or text without an image: 'keep' it without the other, or 'skip' it; both are listed"

if __name__ == "__main__":
    media_main(
        "mvsa",
        __doc__,
        prepare_mvsa,
        miniature,
        labels=("agree", LABELS),
        incomplete=("keep", INCOMPLETE),
        audio=None,
        seconds=None,
        fps=None,
        frames=None,
    )
