"""Prepare IEMOCAP (audio, video, text; 4 emotions) from its full release.

    python data_scripts/prepare_iemocap.py --root IEMOCAP_full_release --split session=5
    python data_scripts/prepare_iemocap.py --root IEMOCAP_full_release --split train.txt test.txt --variant published
    python data_scripts/prepare_iemocap.py --root IEMOCAP_full_release --faces whole --variant whole
    python data_scripts/prepare_iemocap.py --miniature

Doing it twice does nothing; if it was killed, the same command goes on where it stopped.
"""

from mla_nb.data.iemocap import iemocap_main

if __name__ == "__main__":
    iemocap_main(doc=__doc__)
