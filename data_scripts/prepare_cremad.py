"""Prepare CREMA-D (audio, video; 6 emotions) from a clone of its repository.

    python data_scripts/prepare_cremad.py --root CREMA-D
    python data_scripts/prepare_cremad.py --root CREMA-D --split cremad_ogm_train.csv cremad_ogm_test.csv
    python data_scripts/prepare_cremad.py --root CREMA-D --split speaker --variant speaker
    python data_scripts/prepare_cremad.py --miniature

Doing it twice does nothing; if it was killed, the same command goes on where it stopped.
"""

from mla_nb.data.cremad import cremad_main

if __name__ == "__main__":
    cremad_main(doc=__doc__)
