"""Prepare MVSA-Single (image, text; positive, neutral, negative) from its unpacked
download: data/ and labelResultAll.txt.

    python data_scripts/prepare_mvsa.py --root MVSA_Single
    python data_scripts/prepare_mvsa.py --root MVSA_Single --split a.jsonl b.jsonl
    python data_scripts/prepare_mvsa.py --root MVSA_Single --labels resolve
    python data_scripts/prepare_mvsa.py --miniature

Preparation is idempotent and resumes after a kill.
"""

from mla_nb.data.mvsa import mvsa_main

if __name__ == "__main__":
    mvsa_main(doc=__doc__)
