"""Prepare UPMC Food-101 (image, text; 101 dishes) from its unpacked download: images/{train,test}/ and texts/.

    python data_scripts/prepare_food101.py --root food-101
    python data_scripts/prepare_food101.py --root food-101 --split train.jsonl dev.jsonl test.jsonl --variant qmf
    python data_scripts/prepare_food101.py --root food-101 --incomplete skip --variant whole
    python data_scripts/prepare_food101.py --miniature

Doing it twice does nothing; if it was killed, the same command goes on where it stopped.
"""

from mla_nb.data.food101 import prepare_food101
from mla_nb.data.media import media_main
from mla_nb.data.miniature import miniature

SPLITS = ", 'official' (the folders train and test; a tenth of train is set aside for validation)"
INCOMPLETE = "what to do with an image without a title, or a title without an image: 'keep' it without the other, or 'skip' it; both are listed"

if __name__ == "__main__":
    media_main(
        "food101",
        __doc__,
        prepare_food101,
        miniature,
        SPLITS,
        default="official",
        incomplete=("keep", INCOMPLETE),
        audio=None,
        seconds=None,
        fps=None,
        frames=None,
    )
