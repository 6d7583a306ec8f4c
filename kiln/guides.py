"""Guides: the families of distributions that approximate a posterior."""

from guides import (
    amortized_encoder,
    bernoulli_dropout,
    conditional_normal,
    full_rank_normal,
    funnel_flow,
    low_rank_normal,
    mean_field_normal,
    planar_flow,
    spline_flow,
)

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
