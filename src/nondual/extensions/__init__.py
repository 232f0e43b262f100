"""The essay's proposals for what could come next, each as a mixer with its laws.

continuous   positions that are query and key at once: scores without fixed roles, and a flow down one energy
"""

from nondual.extensions.continuous import EnergyFlow, Roles, euler

__all__ = ["EnergyFlow", "Roles", "euler"]
