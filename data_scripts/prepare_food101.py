"""Prepare UPMC Food-101 (image, text; 101 dishes) from its unpacked download:
images/{train,test}/ and texts/.

    python data_scripts/prepare_food101.py --root food-101
    python data_scripts/prepare_food101.py --root food-101 --split a.jsonl b.jsonl
    python data_scripts/prepare_food101.py --root food-101 --split train.txt test.txt
    python data_scripts/prepare_food101.py --root food-101 --incomplete skip
    python data_scripts/prepare_food101.py --miniature

Preparation is idempotent and resumes after a kill.
"""

from mla_nb.data.food101 import food101_main

if __name__ == "__main__":
    food101_main(doc=__doc__)
