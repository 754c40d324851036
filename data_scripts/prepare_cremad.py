"""Prepare CREMA-D (audio, video; 6 emotions) from a clone of its repository.

    python data_scripts/prepare_cremad.py --root CREMA-D
    python data_scripts/prepare_cremad.py --root CREMA-D --split TRAIN TEST --variant X
    python data_scripts/prepare_cremad.py --root CREMA-D --split speaker --variant new
    python data_scripts/prepare_cremad.py --miniature

TRAIN and TEST are lists: train.csv and test.csv of OGM-GE, or my_train_cre.txt and
my_test_cre.txt of MLA. They are two different splits of the same sizes; which one was
taken is recognized and stored.

Preparation is idempotent and resumes after a kill.
"""

from mla_nb.data.cremad import cremad_main

if __name__ == "__main__":
    cremad_main(doc=__doc__)
