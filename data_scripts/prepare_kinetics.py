"""Prepare Kinetics-Sounds (audio, video) from videos in class folders: videos/<class>/<clip>.mp4.

    python data_scripts/prepare_kinetics.py --root KS --split train.csv test.csv
    python data_scripts/prepare_kinetics.py --root KS --split train.csv valid.csv test.csv --absent skip
    python data_scripts/prepare_kinetics.py --miniature

Doing it twice does nothing; if it was killed, the same command goes on where it stopped.
"""

from mla_nb.data.own import kinetics_main

if __name__ == "__main__":
    kinetics_main(doc=__doc__)
