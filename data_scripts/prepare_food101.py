"""Prepare UPMC Food-101 (image, text; 101 dishes) from its unpacked download: images/{train,test}/ and texts/.

    python data_scripts/prepare_food101.py --root food-101
    python data_scripts/prepare_food101.py --root food-101 --split train.jsonl dev.jsonl test.jsonl --variant qmf
    python data_scripts/prepare_food101.py --root food-101 --incomplete skip --variant whole
    python data_scripts/prepare_food101.py --miniature

Doing it twice does nothing; if it was killed, the same command goes on where it stopped.
"""

from mla_nb.data.food101 import food101_main

if __name__ == "__main__":
    food101_main(doc=__doc__)
