"""The pictures of `linlora.fusion.analysis`: the cosine matrix and the map of the disentanglement error."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from linlora.fusion.analysis import Disentanglement
from linlora.storage.files import write_bytes


def draw_cosines(matrix: np.ndarray, names: Sequence[str], path: str | os.PathLike) -> None:
    """A matrix of cosines with its numbers; the diagonal, 1 by definition, is left grey and out of the colour scale.

    >>> draw_cosines(np.array([[1.0, 0.1], [0.1, 1.0]]), ["digits", "letters"], "cosines.png")
    """
    if matrix.shape != (len(names), len(names)):
        raise ValueError(f"draw_cosines: a matrix of shape {matrix.shape} for {len(names)} names")
    own = np.eye(len(names), dtype=bool)
    limit = max(0.05, float(np.abs(matrix[~own]).max(initial=0.0)))
    figure = Figure(figsize=(3.0 + 0.7 * len(names), 2.2 + 0.6 * len(names)), layout="constrained")
    axes = figure.add_subplot()
    axes.set_facecolor("0.85")
    image = axes.imshow(np.ma.array(matrix, mask=own), cmap="PuOr_r", vmin=-limit, vmax=limit)
    for i, j in np.ndindex(matrix.shape):
        dark = i != j and abs(matrix[i, j]) > 0.65 * limit
        axes.text(j, i, f"{matrix[i, j]:.2f}", ha="center", va="center", fontsize=9, color="w" if dark else "k")
    axes.set_xticks(range(len(names)), names, rotation=40, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(names)), names)
    axes.set_title("Cosine between task vectors")
    figure.colorbar(image, ax=axes, label="cosine", shrink=0.8)
    save(figure, path)


def draw_disentanglement(found: Disentanglement, names: Sequence[str], path: str | os.PathLike) -> None:
    """The map of ξ(λ1, λ2), λ1 to the right and λ2 upwards; the box is [0, 1]², where λ is searched.

    >>> found = Disentanglement(np.array([0.0, 0.5, 1.0]), np.zeros((2, 3, 3)))
    >>> draw_disentanglement(found, ["digits", "letters"], "disentanglement.png")
    """
    figure = Figure(figsize=(5.6, 4.6), layout="constrained")
    axes = figure.add_subplot()
    order = np.argsort(found.scalings)
    grid, error = found.scalings[order], found.error[np.ix_(order, order)]
    mesh = axes.pcolormesh(grid, grid, error.T, shading="nearest", cmap="viridis", vmin=0.0, vmax=max(error.max(), 0.1))
    axes.plot([0, 1, 1, 0, 0], [0, 0, 1, 1, 0], color="#D55E00", linewidth=1.6)
    axes.set_aspect("equal")
    axes.set_xlabel(f"λ1 of {names[0]}")
    axes.set_ylabel(f"λ2 of {names[1]}")
    axes.set_title(f"Weight-disentanglement error (mean {error.mean():.3f})")
    figure.colorbar(mesh, ax=axes, label="ξ: rate of disagreement, both tasks summed")
    save(figure, path)


def save(figure: Figure, path: str | os.PathLike) -> None:
    """Through the Agg canvas and not pyplot, so that no display is needed and no global state is touched."""
    FigureCanvasAgg(figure)
    content = io.BytesIO()
    figure.savefig(content, format=Path(path).suffix.removeprefix(".") or "png", dpi=150)
    write_bytes(path, content.getvalue())
