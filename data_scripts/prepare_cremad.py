"""Prepare CREMA-D (audio, video; 6 emotions) from a clone of its repository.

    python data_scripts/prepare_cremad.py --root CREMA-D
    python data_scripts/prepare_cremad.py --root CREMA-D --split cremad_ogm_train.csv cremad_ogm_test.csv
    python data_scripts/prepare_cremad.py --root CREMA-D --split speaker --variant speaker
    python data_scripts/prepare_cremad.py --miniature

Doing it twice does nothing; if it was killed, the same command goes on where it stopped.
"""

from mla_nb.data.cremad import prepare_cremad
from mla_nb.data.media import media_main
from mla_nb.data.miniature import miniature

if __name__ == "__main__":
    media_main(
        "cremad",
        __doc__,
        prepare_cremad,
        miniature,
        ", 'speaker' (no actor in two parts)",
    )
