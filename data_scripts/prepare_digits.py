"""Prepare the digits dataset: spoken digits (Free Spoken Digit Dataset) with
scikit-learn's handwritten ones.

    python data_scripts/prepare_digits.py --archive free-spoken-digit-dataset.zip
    python data_scripts/prepare_digits.py --root fsdd --split speaker
    python data_scripts/prepare_digits.py --download --image_noise 0.5 --n_train 800

The options decide the folder below --data: data/digits, data/digits-speaker,
data/digits-noise0.5-n800, ...
Preparation is idempotent and resumes after a kill.
"""

from mla_nb.data.digits import digits_main

if __name__ == "__main__":
    digits_main(doc=__doc__)
