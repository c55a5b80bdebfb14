"""Published runs: what is in the repository of one, its model card, pushing and pulling."""

from mllm_cl.hub.card import Router, is_hub_id
from mllm_cl.hub.layout import Publication, gather
from mllm_cl.hub.pull import Pulled, pull
from mllm_cl.hub.push import push

__all__ = ["Publication", "Pulled", "Router", "gather", "is_hub_id", "pull", "push"]
