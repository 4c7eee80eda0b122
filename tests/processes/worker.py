"""The train verb, with the rows that this process reads kept in KEPT_BATCHES, and slow data where SLOW_DATA says so."""

import os
import time
from pathlib import Path

import numpy as np

from t5x_domain import train
from t5x_domain.training.feed import Feed


def main():
    plain, process = Feed.train_batches, int(os.environ.get("JAX_PROCESS_ID", "0"))
    folder = Path(os.environ["KEPT_BATCHES"])

    def keep(feed, start):
        for step, batch, raw_tokens in plain(feed, start):
            name = f"{step:03}_{process}.npz"
            np.savez(folder / f".{name}", **batch)
            (folder / f".{name}").rename(folder / name)  # whole, or not there: some processes are killed
            time.sleep(float(os.environ["SLOW_DATA"]) if process == 1 else 0)
            yield step, batch, raw_tokens

    Feed.train_batches = keep
    train.main()


if __name__ == "__main__":
    main()
