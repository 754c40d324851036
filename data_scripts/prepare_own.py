"""Prepare data of your own from one table (CSV or JSON lines): id, label, and any of
audio, video, image, text.

    python data_scripts/prepare_own.py --table my_study/table.csv --name study
    python data_scripts/prepare_own.py --table my_study/table.csv --split group
    python data_scripts/prepare_own.py --miniature
    mla train --dataset own --dataset_args variant=study --method mla

Paths in the table are relative to its folder, or absolute; an empty cell means that
the sample lacks that modality.
Preparation is idempotent and resumes after a kill.
"""

from mla_nb.data.own import own_main

if __name__ == "__main__":
    own_main(doc=__doc__)
