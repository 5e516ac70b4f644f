"""How well words alone tell the chosen from the rejected answer of preference pairs: a logistic
regression on words and word pairs, beside "the longer one".

    python scripts/pair_words.py hh-rlhf

The penalty is chosen on a tenth of the training pairs, by prompt; held-out pairs are asked once.
"""

import sys

import numpy as np
from sklearn.feature_extraction.text import HashingVectorizer
from sklearn.linear_model import LogisticRegression

from modern_llm.data.pairs import preference_pairs
from modern_llm.statistics import proportion_interval

words = HashingVectorizer(n_features=2**18, ngram_range=(1, 2), binary=True, norm=None,
                          alternate_sign=False, token_pattern=r"[a-z']+|[.,!?]")
PENALTIES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)


def read(source: str, split: str, limit: int = 100_000):
    """The pairs, and the words of the chosen answer less those of the rejected one."""
    pairs, _ = preference_pairs(source, split, limit, 0, 0)
    chosen, rejected = (words.transform([getattr(pair, side) for pair in pairs])
                        for side in ("chosen", "rejected"))
    return pairs, chosen - rejected


def fitted(features, penalty: float):
    """A regression without intercept: turning a pair round turns its score round."""
    signs = np.where(np.arange(features.shape[0]) % 2, 1, -1)
    model = LogisticRegression(C=penalty, fit_intercept=False, max_iter=2000)
    return model.fit(features.multiply(signs[:, None]).tocsr(), signs)


def right(model, features) -> np.ndarray:
    return model.decision_function(features) > 0


if __name__ == "__main__":
    pairs, features = read(sys.argv[1], "train")
    aside = np.array([sum(map(ord, pair.request)) % 10 == 0 for pair in pairs])
    scores = {c: right(fitted(features[~aside], c), features[aside]).mean() for c in PENALTIES}
    best = max(scores, key=scores.get)
    held, other = read(sys.argv[1], "validation")
    found = {"words": right(fitted(features, best), other),
             "the longer one": [len(pair.chosen) > len(pair.rejected) for pair in held]}
    print(f"{len(pairs):,} pairs, penalty {best:g} "
          f"({', '.join(f'{c:g}: {share:.3f}' for c, share in scores.items())})")
    for name, values in found.items():
        row = proportion_interval(float(np.sum(values)), len(values))
        print(f"{name}: {row['value']:.3f} [{row['low']:.3f}, {row['high']:.3f}] of {row['n']}")
