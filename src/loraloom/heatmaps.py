"""What `inspect` found, as a page shows it: words, tables, spectra, and phi(i, j) as heat maps.

It works on the numbers of analysis.json alone, so that a run's report shows them without torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from .curves import SHOWN, Chart, csv_address, evenly
from .figures import NARROW, PAGE, WIDE, Colours, figure_drawing, figure_files, heat_panel, ticks
from .wording import number

Row = Mapping[str, Any]
SIDES = {
    "A": "right singular vectors of A",
    "B": "left singular vectors of B",
    "V": "right singular vectors of the update",
    "U": "left singular vectors of the update",
}


def kinds_of(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["kind"] for row in rows))


# ---- figures ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Panel:
    """One heat map: phi, rows i and columns j."""

    title: str
    phi: list[list[float]]


@dataclass(frozen=True)
class Figure:
    """A drawing that can stand in a page or in files, with its numbers.

    draw(figure, colours, columns) lays panels out in so many columns
    """

    name: str
    title: str
    unit: str
    draw: Any
    panels: int
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    legend: Sequence[tuple[str, int, str]] = ()
    height: int = 240  # of one row of panels

    def size(self, width: int, columns: int) -> tuple[int, int]:
        return width, self.height * -(-self.panels // columns)

    def on_page(self) -> Chart:
        wide, narrow = min(4, max(2, self.panels)), min(2, self.panels)
        shown = [[number(value) for value in row] for row in evenly(self.rows, SHOWN)]

        def drawn(name: str, width: int, columns: int) -> str:
            return figure_drawing(
                name, self.size(width, columns), self.title, lambda f, c: self.draw(f, c, columns)
            )

        return Chart(
            title=self.title,
            unit=self.unit,
            svg=drawn(self.name, WIDE[0], wide),
            narrow=drawn(f"{self.name}-narrow", NARROW[0], narrow),
            legend=list(self.legend),
            columns=list(self.columns),
            rows=shown,
            count=len(self.rows),
            csv=csv_address(self.columns, self.rows),
            file=f"{self.name}.csv",
        )

    def as_files(self, folder: Path) -> list[Path]:
        columns = min(4, max(2, self.panels))

        def titled(figure: Any, colours: Colours) -> None:
            self.draw(figure, colours, columns)
            words = f"{self.title}: {self.unit}" if self.unit else self.title
            figure.suptitle(words, color=colours.ink, fontsize=12)

        return figure_files(folder / self.name, self.size(WIDE[0], columns), titled)


def figures_of(analysis: Row) -> list[Figure]:
    """Every figure of an analysis."""
    layers = [row for row in analysis["layers"] if row.get("singular_values") and row.get("norm")]
    found = [spectra(layers, analysis)] if layers else []
    found += [by_layer(layers)] if any(row["number"] is not None for row in layers) else []
    for pair in whole_pairs(analysis):
        drawn = [figure for side in SIDES if (figure := maps(analysis, pair, side))]
        found += drawn[:2]  # of A and B where both are trained, else of the update: the other two look alike
    return found


def whole_pairs(analysis: Row) -> list[int | None]:
    """The decoder layers whose phi was kept whole."""
    pairs = (analysis.get("comparison") or {}).get("layers", [])
    return list(dict.fromkeys(pair["number"] for pair in pairs if has_maps(pair)))


def has_maps(pair: Row) -> bool:
    return any("phi" in side for side in pair["sides"].values())


def maps(analysis: Row, layer: int | None, side: str) -> Figure | None:
    """phi(i, j) of one decoder layer, a heat map for each kind of weight, and random matrices as control."""
    comparison = analysis["comparison"]
    pairs = [p for p in comparison["layers"] if p["number"] == layer and "phi" in p["sides"].get(side, ())]
    if not pairs:
        return None
    panels = [Panel(pair["kind"], pair["sides"][side]["phi"]) for pair in pairs]
    controls: dict[Any, Panel] = {}
    for pair in pairs:
        phi, size, control = (pair["sides"][side][key] for key in ("phi", "size", "control"))
        title = f"random, d = {size}"
        controls.setdefault((size, len(phi), len(phi[0])), Panel(title, control))
    panels += controls.values()
    first, second = analysis["adapter"]["name"], comparison["with"]["name"]
    where = f", layer {layer}" if layer is not None else ""
    width = max(len(panel.phi[0]) for panel in panels)
    rows = [[panel.title, i + 1, *line] for panel in panels for i, line in enumerate(panel.phi)]

    def draw(figure: Any, _: Colours, columns: int) -> None:
        grid = figure.subplots(-(-len(panels) // columns), columns, squeeze=False).flatten()
        image = None
        for axes, panel in zip(grid, panels):
            image = heat_panel(axes, panel.phi)
            axes.set_title(panel.title)
        for place, axes in enumerate(grid):
            axes.set_visible(place < len(panels))
            axes.set_xlabel("j")
            axes.set_ylabel("i", rotation=0, labelpad=8)
        bar = figure.colorbar(image, ax=list(grid), fraction=0.025, pad=0.02)
        bar.outline.set_visible(False)
        bar.ax.tick_params(length=0)

    return Figure(
        name=f"phi-{side}" + (f"-layer-{layer}" if layer is not None else ""),
        title=f"φ(i, j), {SIDES[side]}{where}",
        unit=f"i of {first}, j of {second}",
        draw=draw,
        panels=len(panels),
        columns=["weight", "i", *(f"j = {j + 1}" for j in range(width))],
        rows=rows,
    )


def spectra(layers: Sequence[Row], analysis: Row) -> Figure:
    """Singular values over the largest, each layer faint and the median of each kind strong."""
    kinds = kinds_of(layers)
    pairs = (analysis.get("comparison") or {}).get("layers", [])
    others = [
        pair["other"] | {"kind": pair["kind"]} for pair in pairs if (pair.get("other") or {}).get("norm")
    ]
    rows = [[row["name"], at_ + 1, s] for row in layers for at_, s in enumerate(row["singular_values"])]

    def draw(figure: Any, colours: Colours, columns: int) -> None:
        grid = figure.subplots(-(-len(kinds) // columns), columns, squeeze=False).flatten()
        for axes, kind in zip(grid, kinds):
            for place, group in enumerate((layers, others)):
                curves = [scaled(row) for row in group if row["kind"] == kind]
                for y in curves:
                    axes.semilogy(range(1, len(y) + 1), y, color=colours.series[place], lw=0.8, alpha=0.2)
                if curves:
                    y = middle(curves)
                    axes.semilogy(range(1, len(y) + 1), y, color=colours.series[place], lw=2)
            axes.set_title(kind)
            axes.set_xlabel("i", loc="right", labelpad=1)
            axes.xaxis.set_ticks(ticks(max(len(line.get_xdata()) for line in axes.lines)))
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.minorticks_off()
            axes.margins(x=0.02)
        for axes in grid[len(kinds) :]:
            axes.set_visible(False)
        own_legend(figure, colours, legend)

    legend = [(f"{analysis['adapter']['name']}, median", 1, "line")]
    if others:
        legend.append((f"{analysis['comparison']['with']['name']}, median", 2, "line"))
    return Figure(
        name="spectra",
        title="Singular values of the update",
        unit="sᵢ / s₁, each layer faint",
        draw=draw,
        panels=len(kinds),
        columns=["layer", "i", "singular value"],
        rows=rows,
        legend=legend,
    )


def own_legend(figure: Any, colours: Colours, entries: Sequence[tuple[str, int, str]]) -> None:
    """The legend of a picture that stands alone; a page writes its own."""
    if colours is PAGE:
        return
    for text, series, _ in entries:
        figure.axes[0].plot([], [], color=colours.series[(series - 1) % 8], lw=2, label=text)
    figure.legend(loc="outside lower center", ncols=len(entries), frameon=False, labelcolor=colours.ink)


def scaled(row: Row) -> list[float]:
    s = row["singular_values"]
    return [value / s[0] for value in s]


def middle(curves: Sequence[Sequence[float]]) -> list[float]:
    """The median of several spectra, as far as the shortest goes."""
    return [median(column) for column in zip(*curves)]


def by_layer(layers: Sequence[Row]) -> Figure:
    """How size, effective rank and amplification go with depth, a line for each kind."""
    wanted = [("ratio", "‖ΔW‖/‖W‖, %", 100.0), ("norm", "‖ΔW‖", 1.0)]
    wanted = [next(item for item in wanted if any(row.get(item[0]) for row in layers))]
    wanted += [("effective_rank", "effective rank", 1.0), ("amplification", "amplification", 1.0)]
    wanted = [item for item in wanted if any(row.get(item[0]) is not None for row in layers)]
    kinds = kinds_of(layers)

    def draw(figure: Any, colours: Colours, columns: int) -> None:
        grid = figure.subplots(-(-len(wanted) // columns), columns, squeeze=False).flatten()
        for axes, (key, title, scale) in zip(grid, wanted):
            for place, kind in enumerate(kinds):
                points = [
                    (row["number"], row[key] * scale)
                    for row in layers
                    if row["kind"] == kind and row["number"] is not None and row.get(key) is not None
                ]
                style = ("-", "--")[place // len(colours.series) % 2]
                axes.plot(*zip(*points), style, color=colours.series[place % 8], lw=1.8) if points else None
            axes.set_title(title)
            axes.set_ylim(bottom=0)
            axes.set_xlabel("layer", loc="right", labelpad=1)
            axes.xaxis.get_major_locator().set_params(integer=True)
        for axes in grid[len(wanted) :]:
            axes.set_visible(False)
        own_legend(figure, colours, legend)

    columns = ["layer", *(title for _, title, _ in wanted)]
    rows = [[row["name"], *(row.get(key) for key, _, _ in wanted)] for row in layers]
    legend = [(kind, place % 8 + 1, "line") for place, kind in enumerate(kinds)]
    return Figure("by-layer", "By depth", "", draw, len(wanted), columns, rows, legend)
