"""Prepare IEMOCAP (audio, video, text; 4 emotions) from its full release.

    python data_scripts/prepare_iemocap.py --root IEMOCAP_full_release
    python data_scripts/prepare_iemocap.py --root IEMOCAP_full_release --split session=5
    python data_scripts/prepare_iemocap.py --root IEMOCAP --split TRAIN TEST
    python data_scripts/prepare_iemocap.py --root IEMOCAP_full_release --faces whole
    python data_scripts/prepare_iemocap.py --miniature

Preparation is idempotent and resumes after a kill.
"""

from mla_nb.data.iemocap import iemocap_main

if __name__ == "__main__":
    iemocap_main(doc=__doc__)
