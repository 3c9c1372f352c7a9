"""Published figures, shown beside ours, with the 95 % interval where the paper gives one, and how long was trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["with_published"]

# By learner, and ways and shots (of regression: shots and inner steps).
#
# Omniglot, accuracy in percent, random splits but for ProtoNet and Matching networks. SNAIL: Mishra et al., 2018,
# table 1. MAML: Finn et al., 2017, table 1. First-order MAML and Reptile (without transduction; with it, for its
# transductive rows): Nichol et al., 2018. ANIL: Raghu et al., 2020, deviations over 3 seeds. ProtoNet: Snell et al.,
# 2017. Matching networks: Vinyals et al., 2016.
OMNIGLOT = {
    "SNAIL": {(5, 1): "99.07 ± 0.16", (5, 5): "99.78 ± 0.09", (20, 1): "97.64 ± 0.30", (20, 5): "99.36 ± 0.18"},
    "MAML": {(5, 1): "98.7 ± 0.4", (5, 5): "99.9 ± 0.1", (20, 1): "95.8 ± 0.3", (20, 5): "98.9 ± 0.2"},
    "FirstOrderMAML": {(5, 1): "98.3 ± 0.5", (5, 5): "99.2 ± 0.2", (20, 1): "89.4 ± 0.5", (20, 5): "97.9 ± 0.1"},
    "ANIL": {(20, 1): "96.2 ± 0.5", (20, 5): "98.0 ± 0.3"},
    "Reptile": {(5, 1): "95.39 ± 0.09", (5, 5): "98.90 ± 0.10", (20, 1): "88.14 ± 0.15", (20, 5): "96.65 ± 0.33"},
    "ProtoNet": {(5, 1): "98.8", (5, 5): "99.7", (20, 1): "96.0", (20, 5): "98.9"},
    "MatchingNetwork": {(5, 1): "98.1", (5, 5): "98.9", (20, 1): "93.8", (20, 5): "98.5"},
}
TRANSDUCTIVE = {
    "Reptile": {(5, 1): "97.68 ± 0.04", (5, 5): "99.48 ± 0.06", (20, 1): "89.43 ± 0.14", (20, 5): "97.12 ± 0.32"},
}
# Mean squared error, Finn et al., 2017, table 2.
SINUSOID = {"MAML": {(5, 1): "0.67", (5, 5): "0.38", (5, 10): "0.35"}}

# Outer steps: Finn et al., 2017, appendix A.1; MAML++, Reptile and implicit MAML: the authors' configs for 5-way.
STEPS = {
    "omniglot": {
        "MAML": 60_000,
        "FirstOrderMAML": 60_000,
        "MAMLPlusPlus": 50_000,
        "Reptile": 100_000,
        "ImplicitMAML": 20_000,
    },
    "sinusoid": {"MAML": 70_000},
}


def with_published(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record with the published figure and length of training for its learner and setting, where there are such."""
    training = record.get("training")
    if training is None or not str(record["split"]).endswith("/test"):
        return dict(record)
    dataset, learner = record["dataset"], record["learner"]
    figures, setting = {}, (record["ways"], record["shots"])
    if dataset == "omniglot":
        transductive = record["batch_norm"] == "transductive" and learner in TRANSDUCTIVE
        figures = (TRANSDUCTIVE if transductive else OMNIGLOT).get(learner, {})
    elif dataset == "sinusoid":
        figures, setting = SINUSOID.get(learner, {}), (record["shots"], record["inner_steps"])
    steps = STEPS.get(dataset, {}).get(learner)
    told = training if steps is None else {**training, "published_steps": steps}
    return {**record, "published": figures.get(setting), "training": told}
