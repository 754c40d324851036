"""Run encoders over a prepared dataset once, and keep their features as a dataset of the same format.

    python data_scripts/extract_features.py --dataset food101 --encoder hf:openai/clip-vit-base-patch32
    python data_scripts/extract_features.py --data data/iemocap-miniature --encoder 'audio=small,video=timm:resnet50,text=hf:bert-base-uncased'
    python data_scripts/extract_features.py --dataset iemocap --variant miniature --run runs/RUN

The first makes data/food101-features, on which a run takes seconds:

    mla train --dataset food101 --dataset_args variant=features --encoder features

Doing it twice does nothing; if it was killed, the same command goes on where it stopped.
"""

from mla_nb.features import extract_main

if __name__ == "__main__":
    extract_main(__doc__)
