"""Prepare the digits dataset: spoken digits (Free Spoken Digit Dataset) paired with scikit-learn's handwritten ones.

    python data_scripts/prepare_digits.py --archive free-spoken-digit-dataset.zip
    python data_scripts/prepare_digits.py --root free-spoken-digit-dataset --split speaker
    python data_scripts/prepare_digits.py --download --split speaker --image_noise 0.5 --n_train 800

The options decide the folder below --data: data/digits, data/digits-speaker, data/digits-speaker-noise0.5-n800, ...
Doing it twice does nothing; if it was killed, the same command goes on where it stopped.
"""

from mla_nb.data.digits import digits_main

if __name__ == "__main__":
    digits_main(doc=__doc__)
