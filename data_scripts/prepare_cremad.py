"""Prepare CREMA-D (audio, video; 6 emotions) from a clone of its repository.

    python data_scripts/prepare_cremad.py --root CREMA-D
    python data_scripts/prepare_cremad.py --root CREMA-D --split train.csv test.csv
    python data_scripts/prepare_cremad.py --root CREMA-D --split speaker --variant new
    python data_scripts/prepare_cremad.py --miniature

Preparation is idempotent and resumes after a kill.
"""

from mla_nb.data.cremad import cremad_main

if __name__ == "__main__":
    cremad_main(doc=__doc__)
