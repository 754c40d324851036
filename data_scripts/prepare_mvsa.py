"""Prepare MVSA-Single (image, text; positive, neutral, negative) from its unpacked download: data/ and labelResultAll.txt.

    python data_scripts/prepare_mvsa.py --root MVSA_Single
    python data_scripts/prepare_mvsa.py --root MVSA_Single --split train.jsonl dev.jsonl test.jsonl
    python data_scripts/prepare_mvsa.py --root MVSA_Single --labels resolve --variant resolve
    python data_scripts/prepare_mvsa.py --miniature

Doing it twice does nothing; if it was killed, the same command goes on where it stopped.
"""

from mla_nb.data.mvsa import mvsa_main

if __name__ == "__main__":
    mvsa_main(doc=__doc__)
