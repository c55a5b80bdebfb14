"""Evaluation: answers generated, scored, and put into the accuracy matrix. The door of the room is `get_scorer`."""

from mllm_cl.evaluation.scorers import SCORERS, find_scorer, get_scorer

__all__ = ["SCORERS", "find_scorer", "get_scorer"]
