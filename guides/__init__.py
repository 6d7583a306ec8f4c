"""Guides: the families that a posterior is approximated by."""

from guides.amortized import amortized_encoder
from guides.conditional import conditional_normal
from guides.dropout import bernoulli_dropout
from guides.full_rank import full_rank_normal, low_rank_normal
from guides.funnel import funnel_flow
from guides.mean_field import mean_field_normal
from guides.planar import planar_flow
from guides.spline import spline_flow

__all__ = [
    "amortized_encoder",
    "bernoulli_dropout",
    "conditional_normal",
    "full_rank_normal",
    "funnel_flow",
    "low_rank_normal",
    "mean_field_normal",
    "planar_flow",
    "spline_flow",
]
