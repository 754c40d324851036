"""Run encoders over a prepared dataset once, and keep their features as a dataset of
the same format.

    mla features --dataset food101 --encoder timm:resnet50
    mla features --data data/mine --encoder 'audio=small'
    mla features --dataset iemocap --run runs/RUN

The first makes data/food101-features, on which a run takes seconds:

    mla train --dataset food101 --dataset_args variant=features --encoder features

Such a run answers files: mla predict runs/RUN --image a.jpg --text "…". Modalities
that --encoder or --modalities does not name stay as they are.
Extraction is idempotent and resumes after a kill.
"""

from mla_nb.features import extract_main

if __name__ == "__main__":
    extract_main(__doc__)
