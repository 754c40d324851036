"""Prepare Kinetics-Sounds (audio, video) from videos in class folders:
videos/<class>/<clip>.mp4.

    python data_scripts/prepare_kinetics.py --root KS --split train.csv test.csv
    python data_scripts/prepare_kinetics.py --root KS --split random --absent skip
    python data_scripts/prepare_kinetics.py --miniature

Preparation is idempotent and resumes after a kill.
"""

from mla_nb.data.own import kinetics_main

if __name__ == "__main__":
    kinetics_main(doc=__doc__)
