"""Guides: the families that a posterior is approximated by."""

from guides.mean_field import mean_field_normal

__all__ = ["mean_field_normal"]
