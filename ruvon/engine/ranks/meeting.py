"""How often a rank meets others, counted: what tells whether ranks can go on after a failure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ParamSpec, TypeVar

from ruvon.engine.ranks.steps import Meetings
from ruvon.kernels.mesh import Mesh

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(slots=True)
class MeetingCounter:
    """Counts the calls of a mesh's functions, which one thread makes, step by step. A GPU's graphs
    are replayed without them, and what no graph holds is launched while the step before computes:
    there nothing is counted, and a failure is known by who does not end the step."""

    collectives: int = 0
    sent: int = 0
    received: int = 0
    inside: bool = False

    def take(self) -> Meetings:
        """What has been counted since the last time."""
        counted = Meetings(self.collectives, self.sent, self.received, self.inside)
        self.collectives = self.sent = self.received = 0
        self.inside = False
        return counted

    def over(self, mesh: Mesh) -> Mesh:
        """The same mesh, counted."""
        return replace(
            mesh,
            reduce=self._counted(mesh.reduce, "collectives"),
            gather=self._counted(mesh.gather, "collectives"),
            send=mesh.send if mesh.is_last else self._counted(mesh.send, "sent"),
            receive=mesh.receive if mesh.is_first else self._counted(mesh.receive, "received"),
        )

    def _counted(self, function: Callable[P, T], name: str) -> Callable[P, T]:
        def counted(*args: P.args, **options: P.kwargs) -> T:
            self.inside = True
            result = function(*args, **options)
            self.inside = False
            setattr(self, name, getattr(self, name) + 1)
            return result

        return counted
