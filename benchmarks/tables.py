"""Write the tables of README and docs from ``results/*.json``, between their markers.

    python benchmarks/tables.py          # rewrite
    python benchmarks/tables.py --check  # exit 1 where a table differs from the results

A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->``.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
from functools import lru_cache, partial
from pathlib import Path

from backsketch.experiments.store import Sweep
from backsketch.experiments.views import VIEWS, Page, arms, equal_cost
from backsketch.experiments.views import headline as headline_view
from backsketch.experiments.views import trade_off as cost

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"(<!-- table: ([\w-]+) -->\n)(?:.*?)(<!-- end -->)", re.S)


@lru_cache
def _load(name: str) -> dict:
    return json.loads((ROOT / "results" / f"{name}.json").read_text())


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def real_variance() -> str:
    table: dict[str, dict[float, dict]] = {}
    for row in _load("real_variance")["rows"]:
        table.setdefault(row["estimator"], {})[row["keep"]] = row
    keeps = sorted(next(iter(table.values())), reverse=True)
    header = ["estimator", *(f"grad_input, keep {k}" for k in keeps)]
    header += [f"grad_weight, keep {k}" for k in keeps]
    rows = []
    for name, cells in table.items():
        saver = name.startswith(("stored", "projection"))  # their grad_input is exact
        inputs = ["exact" if saver else f"{cells[k]['grad_input']:.3f}" for k in keeps]
        rows.append([name, *inputs, *(f"{cells[k]['grad_weight']:.3f}" for k in keeps)])
    return _markdown(header, rows)


def designs() -> str:
    table: dict[str, dict[float, float]] = {}
    for row in _load("designs")["rows"]:
        table.setdefault(row["design"], {})[row["keep"]] = row["variance"]
    keeps = sorted(next(iter(table.values())), reverse=True)
    rows = [[f"`{name}`", *(f"{cells[k]:.3f}" for k in keeps)] for name, cells in table.items()]
    return _markdown(["design", *(f"keep {k}" for k in keeps)], rows)


def layer_time() -> str:
    table: dict[str, dict[str, dict]] = {}
    for row in _load("layer_time")["rows"]:
        table.setdefault(row["sketch"], {})[row["shape"]] = row
    shapes = list(next(iter(table.values())))
    exact = [next(iter(table.values()))[s]["exact_ms"] for s in shapes]
    rows = [["exact, ms", *(f"{ms:.1f}" for ms in exact), ""]]
    for sketch, cells in table.items():
        ratios = [f"×{cells[s]['ratio']:.2f}" for s in shapes]
        rows.append([f"`{sketch}`", *ratios, f"×{cells[shapes[0]]['floor']:.2f}"])
    return _markdown(["sketch", *shapes, "floor"], rows)


def gpu_layers() -> str:
    layers = [row for row in _load("gpu/layers")["layers"] if "compiled" not in row["dtype"]]
    names = [" → ".join(f"{n:,}" for n in row["rows, in, out"][1:]) for row in layers]
    header = ["step over exact", *(f"{n}, {row['dtype']}" for n, row in zip(names, layers))]
    rows = [["exact, ms", *(f"{row['arms']['exact']['ms']:.2f}" for row in layers)]]
    for arm in layers[0]["arms"]:
        if arm != "exact":
            rows.append([f"`{arm}`", *(f"{r['arms'][arm]['over_exact']:.2f}" for r in layers)])
    return _markdown(header, rows)


def gpu_products() -> str:
    shapes = _load("gpu/products")["products"]
    header = ["TFLOP/s", *(" × ".join(f"{n:,}" for n in row["rows, in, out"]) for row in shapes)]
    kinds = shapes[0]["teraflops"]
    rows = [[kind, *(f"{row['teraflops'][kind]:.0f}" for row in shapes)] for kind in kinds]
    return _markdown(header, rows)


def gpu_memory() -> str:
    models = [_load(f"gpu/{name}")["arms"] for name in ("vit", "gpt")]
    rows = []
    for arm in models[0]:
        cells = [m.get(arm, {}).get(kind) for m in models for kind in ("saved_mib", "peak_mib")]
        rows.append([f"`{arm}`", *("" if c is None else f"{c:,.0f}" for c in cells)])
    header = ["MiB", "ViT-B: saved", "peak of a step", "GPT: saved", "peak of a step"]
    return _markdown(header, rows)


def gpu_launches() -> str:
    arms = _load("gpu/launches")["arms"]
    rows = [
        [
            f"`{a}`",
            f"{r['device_ms']:.2f}",
            f"{r['host_ms']:.2f}",
            f"{r['wall_ms']:.2f}",
            str(r["kernels"]),
        ]
        for a, r in arms.items()
    ]
    return _markdown(["", "kernels run, ms", "host, ms", "step, ms", "kernels"], rows)


def memory() -> str:
    rows = []
    for name, model in _load("memory")["models"].items():
        for row in model["rows"]:
            omega = "" if row["omega"] is None else f"{row['omega']:.4f}"
            exact = row["arm"] == "exact"
            keys = ("step", "saved", "peak", "peak_mapped")
            cells = [f"×{row[key]:.2f}" if key in row else "" for key in keys]
            if exact:
                sizes = [f"{row[f'{k}_mib']:.0f} MiB" if k in row else "" for k in keys[1:]]
                cells = [f"{model['exact_ms']:.0f} ms", *sizes]
            rows.append([name if exact else "", row["arm"], *cells, omega])
    return _markdown(["model", "arm", "step", "saved", "peak", "peak, mapped", "ω"], rows)


def head() -> str:
    rows = []
    for path in sorted((ROOT / "results" / "head").glob("*.json")):
        found = json.loads(path.read_text())
        threads = path.stem.removeprefix("head_").removesuffix("threads")
        for row in found["rows"]:
            exact = row["sketch"] == "exact"
            step = f"{row['ms']:.0f} ms" if exact else f"×{row['ratio']:.2f}"
            saved = f"{row['saved_mib']:.0f} MiB" if exact else f"×{row['saved_ratio']:.4f}"
            rows.append([row["what"] if exact else "", threads, row["sketch"], step, saved])
    return _markdown(["head", "threads", "arm", "forward and backward", "saved"], rows)


def gpt() -> str:
    variance = json.loads((ROOT / "results/gpt/variance.json").read_text())["rows"]
    omega = {(row["sketch"], row["phase"]): row["extra_variance"] for row in variance}
    phases = list(dict.fromkeys(row["phase"] for row in variance))
    rows = []
    for path in sorted((ROOT / "results/gpt").glob("*threads.json")):
        for row in json.loads(path.read_text())["rows"]:
            exact, name = row["sketch"] == "exact", row["sketch"]
            step = f"{row['ms']:.0f} ms" if exact else f"×{row['ratio']:.2f}"
            what = f"{'LoRA, ' * path.stem.startswith('lora')}{row['what']}" if exact else ""
            noise = [
                f"{omega[name, phase]:.4f}"
                if (name, phase) in omega and not path.stem.startswith("lora")
                else ""
                for phase in phases
            ]
            saved = f"{row['saved_mib']:.0f} MiB"
            rows.append([what, path.stem[-8:-7], name, step, saved, *noise])
    header = ["model", "threads", "arm", "step", "saved", *(f"ω {phase}" for phase in phases)]
    return _markdown(header, rows)


def finetuning() -> str:
    looks = _load("gpt/finetuning")["rows"]
    told = [f"{row['when']} of {row['phase']}" for row in looks]
    rows = [
        [
            "test loss",
            *("" if row["test_loss"] is None else f"{row['test_loss']:.2f}" for row in looks),
        ],
        ["κ of the tokens at the head", *(f"{row['kappa']:.2f}" for row in looks)],
    ]
    for name in looks[0]["extra_variance"]:
        rows.append([f"ω, {name}", *(f"{row['extra_variance'][name]:.2g}" for row in looks)])
    return _markdown(["", *told], rows)


def attention() -> str:
    rows = [
        [
            *(str(row[key]) for key in ("context", "batch", "keep")),
            f"{row['share']:.0%}",
            f"×{row['backward']:.2f}",
            f"×{row['step']:.2f}",
            f"{row['variance']:.3f}",
        ]
        for row in json.loads((ROOT / "results/gpt/attention.json").read_text())["rows"]
    ]
    header = ["context", "batch", "keys kept", "attention's backward in the step"]
    return _markdown([*header, "with these keys", "step at best", "relative variance"], rows)


def regions() -> str:
    rows = []
    for path in sorted((ROOT / "results").glob("region_*.json")):
        arms = {row["variant"]: row for row in json.loads(path.read_text())["rows"]}
        for name in ("keep 0.5", "keep 0.25", "keep 0.1", "checkpoint"):
            if name in arms:
                arm = arms[name]
                cells = [f"×{arm[key]:.2f}" for key in ("over_exact", "backward", "saved")]
                rows.append([f"`{path.stem.removeprefix('region_')}`", name, *cells])
    return _markdown(["configuration", "arm", "step", "backward", "saved bytes"], rows)


def host_time() -> str:
    rows = []
    for row in _load("host_time")["rows"]:
        parts = [f"{row[key]:.0f} µs" for key in ("exact_us", "forward_us", "backward_us")]
        both = f"{row['forward_us'] + row['backward_us']:.0f} µs"
        rows.append([row["module"], row["mode"], *parts, both])
    header = ["module", "mode", "exact call", "added forward", "added backward", "added"]
    return _markdown(header, rows)


def functional_vit() -> str:
    rows = []
    for row in _load("functional_vit")["rows"]:
        ratios = [f"×{row[key]:.2f}" for key in ("step", "forward", "backward", "saved")]
        threads = (
            f"{row['threads']}, passive" if row["waiting"] == "passive" else str(row["threads"])
        )
        rows.append([f"`{row['sketch']}`", threads, *ratios])
    header = ["region", "threads", "step", "forward", "backward", "saved bytes"]
    return _markdown(header, rows)


def _sweep(name: str) -> Sweep:
    return Sweep.load(ROOT / "results" / name)


@lru_cache
def _page(name: str) -> Page:
    sweep = _sweep(name)
    return VIEWS[sweep.report](sweep)


def _page_table(name: str, number: int = 0) -> str:
    table = _page(name).tables[number]
    return _markdown(list(table.header), [list(row) for row in table.rows])


TASKS = {
    "logistic_digits": "logistic regression, digits",
    "logistic_mnist": "logistic regression, MNIST",
    "mlp_mnist": "MLP, MNIST",
}


def trade_off() -> str:
    """Cost to the target, predicted and measured, of every arm on every task; below 1 in bold."""
    cells: dict[tuple[str, float], dict[str, str]] = {}
    for task in TASKS:
        exact, *others = cost.arms(_sweep(task))
        for arm in others:
            pair = " / ".join(_cost(value) for value in cost.ratios(arm, exact))
            cells.setdefault((arm.family, arm.keep), {})[task] = pair
    ordered = sorted(cells.items(), key=lambda item: (item[0][0], -item[0][1]))
    rows = [
        [f"{family}, {'share' if family == 'smaller batch' else 'keep'} {keep:g}"]
        + [found.get(task, "") for task in TASKS]
        for (family, keep), found in ordered
    ]
    return _markdown(["cost to target, predicted / measured", *TASKS.values()], rows)


def _cost(value: float | None) -> str:
    if value is None or math.isinf(value):
        return "not reached"
    return f"**{value:.2f}**" if value < 0.995 else f"{value:.2f}"


EQUAL_COST = {
    "equal_cost_mlp": "MLP, MNIST",
    "equal_cost_vit": "ViT, CIFAR-10",
    "equal_cost_vit192": "ViT d 192, CIFAR-10",
    "equal_cost_finetune": "ViT d 192, fine-tuned",
    "equal_cost_bagnet": "BagNet, CIFAR-10",
    "equal_cost_bagnet48": "BagNet w 48, CIFAR-10",
    "equal_cost_gpt": "GPT, tinyshakespeare",
}
PAPER = ("paper_mlp", "paper_vit", "paper_bagnet", "paper_gpt")


def _best_of_kinds(sweep: Sweep) -> dict[str, tuple[arms.Arm, float, float]]:
    found = arms.arms(sweep)
    return headline_view.best_of_kinds(found, found[0].model)


def _best_sketch(kinds: dict[str, tuple[arms.Arm, float, float]]) -> tuple[arms.Arm, float, float]:
    """The first at the target, of those that end level with the best exact arm if one does."""
    exact = kinds["best exact"][0]
    sketched = [best for best in kinds.values() if best[0].is_sketched]
    return min(sketched, key=lambda best: (not arms.ends_level(best[0], exact), best[1]))


def headline() -> str:
    """The best exact arm of every task, the best sketched one that ends level with it, and the aim."""
    rows = []
    for name, task in EQUAL_COST.items():
        sweep = _sweep(name)
        kinds = _best_of_kinds(sweep)
        exact, best = kinds["best exact"][0], _best_sketch(kinds)[0]
        table = _page(name).tables[0]
        told = {row[0]: row for row in table.rows}
        columns = ("time to target", "over best exact", f"final {best.goal.key}")
        seconds, ratio, end = map(table.header.index, columns)
        goal = f"{best.goal.value:g} nats" if best.goal.is_loss else f"{100 * best.goal.value:g} %"
        rows.append(
            [
                f"{task}: {goal}", exact.name, told[exact.name][seconds],
                best.name, told[best.name][seconds], f"**{told[best.name][ratio]}**",
                f"{sweep.settings['aim']:g}", told[exact.name][end], told[best.name][end],
            ]
        )  # fmt: skip
    header = [
        "target", "best exact arm", "time", "best sketched arm", "time", "over exact", "aim",
        "final accuracy or loss, exact", "sketched",
    ]  # fmt: skip
    return _markdown(header, rows)


def headline_in_short() -> str:
    """Times over that of the best exact arm alone: of the best sketched arm, of auto and of autocast."""
    columns, lines = [], {"best sketch": [], "`--sketch auto`": [], headline_view.AUTOCAST: []}
    for name, task in EQUAL_COST.items():
        best = _best_of_kinds(_sweep(name))
        columns.append(task)
        lines["best sketch"].append(f"**{_best_sketch(best)[1]:.2f}**")
        for line, kind in (("`--sketch auto`", "auto"), (headline_view.AUTOCAST,) * 2):
            lines[line].append(f"{best[kind][1]:.2f}" if kind in best else "")
    return _markdown(["time to target", *columns], [[name, *row] for name, row in lines.items()])


def early() -> str:
    """Extra variance after each epoch of the MLP, mean over seeds, and the share of noise."""
    found = arms.arms(_sweep("equal_cost_mlp"))
    epochs = max(arm.first.result["epochs"] for arm in found)
    rows = []
    for arm in found:
        if arm.is_sketched and arm.first.result["epochs"] == epochs:
            omegas = equal_cost.by_epoch(arm, "extra_variance")
            rows.append([arm.name, *(f"{omegas[epoch]:.3f}" for epoch in sorted(omegas))])
    return _markdown(["ω", *(f"epoch {epoch + 1}" for epoch in range(epochs))], rows)


def planner() -> str:
    header = ["plan, predicted / measured", "time", "extra variance", "saved, MiB", "c·v, measured"]
    rows = []
    for checkpoint in _load("planner")["models"].values():
        shape = {"dim": 96, "depth": 4, "patch": 8} | checkpoint["shape"]
        trained = (
            f"{checkpoint['at']} of {checkpoint['epochs']} epochs of {checkpoint['images']} images"
        )
        name = f"**d {shape['dim']}, {shape['depth']} blocks, patch {shape['patch']}, after {trained}**"
        rows.append([name, "", "", "", ""])
        for row in checkpoint["rows"]:
            pair = [row[side] for side in ("predicted", "measured") if row[side]]
            cells = [
                " / ".join(format(side[key] * scale, digits) for side in pair)
                for key, scale, digits in (
                    ("time_ratio", 1, ".2f"),
                    ("extra_variance", 1, ".3f"),
                    ("saved_bytes", 2**-20, ".1f"),
                )
            ]
            rows.append([row["plan"], *cells, f"{row['measured']['cv']:.2f}"])
        best = checkpoint["ideal"]
        ideal = [
            f"{best['time_ratio']:.2f}",
            f"{best['extra_variance']:.3f}",
            "",
            f"{best['cv']:.2f}",
        ]
        rows.append(["the best plan if time fell as arithmetic (not measured)", *ideal])
    return _markdown(header, rows)


def planner_cost() -> str:
    models = _load("planner")["models"].values()
    costs = zip(("first", "second"), *(m["profile_steps"] for m in models))
    rows = [[kind, *(f"{cost:.0f}" for cost in found)] for kind, *found in costs]
    widths = [f"cost in exact steps, d {m['shape'].get('dim', 96)}" for m in models]
    return _markdown(["profile of a process", *widths], rows)


CONTROLLED = {"mlp": "MLP, MNIST", "vit": "ViT, CIFAR-10"}


def controller() -> str:
    """The extra variance that a Monte Carlo finds under the controller."""
    rows = []
    for name, task in CONTROLLED.items():
        found = _load(f"controller_{name}")
        measured = sorted(check["measured_extra_variance"] for check in found["checks"])
        cells = [f"{found['within']} of {len(measured)}", f"{statistics.fmean(measured):.3f}"]
        cells += [f"{measured[0]:.3f} to {measured[-1]:.3f}", str(len(found["log"]))]
        rows.append([task, str(found["steps"]), *cells, f"{found['controller_share']:.1%}"])
    header = ["target 0.1", "steps", "checks in [0.05, 0.15]", "mean", "range", "moves"]
    return _markdown([*header, "controller's share of the time"], rows)


def auto() -> str:
    """``--sketch auto`` beside exact training, and where the seconds go."""
    found = _load("controller_auto")
    exact, sketched = found["none"], found["auto"]
    rows = []
    for name, arm in (("exact", exact), ("`--sketch auto`", sketched)):
        error = f"{100 * arm['test_accuracy']:.2f} ± {100 * arm['standard_error']:.2f} %"
        seconds = [f"{part:.2f}" for part in arm["parts"].values()]
        rows.append([name, error, f"{arm['train_seconds']:.2f}", *seconds])
    ratio = f"**{found['time_ratio']:.2f}**"
    empty = [""] * len(exact["parts"])
    rows.append(["auto over exact", "", ratio, *empty])
    floor = 1 - exact["parts"]["backward"] / exact["train_seconds"]
    rows.append(["exact without its backward pass", "", f"{floor:.2f}", *empty])
    header = ["MLP, MNIST", "accuracy", "seconds", *(f"of them {p}" for p in exact["parts"])]
    return _markdown(header, rows)


def families() -> str:
    rows = []
    for name, found in _load("families")["families"].items():
        exact = [f"{what} {100 * part:.1f} %" for what, part in found["exact"].items()]
        reached = f"{100 * found['share']:.1f} %"
        sites = f"{found['sketched']} of {found['sites']}"
        rows.append([name, reached, sites, "; ".join(exact)])
    header = ["family", "of the backward arithmetic", "layers", "what stays exact"]
    return _markdown(header, rows)


def captured() -> str:
    rows = []
    for name, found in sorted(_load("captured")["families"].items()):
        blocks = found["blocks"]
        regions = f"{blocks['active']} of {blocks['all']}"
        reasons = "; ".join([found["note"], *(f"blocks: {r}" for r in blocks["reasons"])])
        kept = [f"×{found[key]:.2f}" for key in ("saved_by_swap", "saved")]
        rows.append([name, f"{100 * found['share']:.0f} %", *kept, regions, reasons])
    header = [
        "family", "of the backward arithmetic", "bytes, class swap", "bytes, region", "blocks", "what stays exact"
    ]  # fmt: skip
    return _markdown(header, rows)


def compile_time() -> str:
    found = {(row["model"], row["sketch"]): row for row in _load("compile_time")["rows"]}
    rows, models = [], list(dict.fromkeys(model for model, _ in found))
    for (model, sketch), row in sorted(found.items(), key=lambda item: models.index(item[0][0])):
        exact = found[model, "exact"]
        ratios = [f"×{row[key] / exact[key]:.2f}" for key in ("processor_s", "first_s")]
        values = [f"{exact['processor_s']:.0f} s", f"{exact['first_s']:.0f} s"]
        is_exact = sketch == "exact"
        rows.append([row["what"] if is_exact else "", sketch, *(values if is_exact else ratios)])
    return _markdown(["model", "sketch", "first step, processor", "first step, clock"], rows)


def _peer_arms(*parts: str) -> dict[tuple[str, str], dict[tuple[str, float | None], dict]]:
    """Every arm's rows, ``(part, keep)`` to row; keeps fall."""
    found: dict[tuple[str, str], dict[tuple[str, float | None], dict]] = {}
    for part in parts:
        rows = _load("peers")["parts"].get(part, {"rows": []})["rows"]
        for row in sorted(rows, key=lambda row: -(row["keep"] or 0)):
            found.setdefault((row["who"], row["what"]), {})[part, row["keep"]] = row
    who = ["ours", *_load("peers")["peers"]]
    return dict(sorted(found.items(), key=lambda item: who.index(item[0][0]) if item[0][0] else -1))


def _peer_bias(rows: list[dict], tensors: list[str]) -> str:
    """The tensor and keep that is farthest out, or the largest z of those that are within chance."""
    reasons = [row["reason"] for row in rows if "reason" in row]
    if reasons:
        return f"does not run: {reasons[0]}"
    seen = [(t, row) for t in tensors for row in rows if t in row]
    found = [(max(row[t]["z"], row[t]["z_along"]), t, row) for t, row in seen]
    if not found:
        return ""
    z, tensor, row = max(found, key=lambda item: item[0])
    if not row[tensor]["biased"]:
        return f"none seen (z at most {z:.1f})"
    keep = f", keep {row['keep']}" if row["keep"] else ""
    out = f"{row[tensor]['out']} of {row[tensor]['entries']} entries"
    return f"**{tensor}{keep}**: mean ×{1 + row[tensor]['along']:.3g}, z {z:.0f}, {out}"


def _peers(part: str, tensors: list[str]) -> str:
    table, drawn = [], f"{part}_statistics"
    for (who, what), rows in _peer_arms(part, drawn).items():
        times = [row for (of, _), row in rows.items() if of == part]
        draws = [row for (of, _), row in rows.items() if of == drawn]
        if not who:
            table.append(
                ["", f"exact: {times[0]['ms']:.0f} ms", "1", "1", *[""] * len(tensors), ""]
            )
            continue
        cells = [
            " / ".join(f"{r[key]:.2f}" for r in times if key in r) for key in ("time", "saved")
        ]
        for tensor in tensors:
            values = [row[tensor]["variance"] for row in draws if tensor in row]
            text = " / ".join(f"{value:.2g}" for value in values)
            cells.append("exact" if values and max(values) < 1e-9 else text)
        table.append([who, what, *cells, _peer_bias(draws or times, [*tensors, "grad_bias"])])
    names = ["variance" if t == "gradient" else f"variance of {t}" for t in tensors]
    return _markdown(["", "what is random", "time", "saved", *names, "bias"], table)


def peers() -> str:
    rows = []
    for name, peer in _load("peers")["peers"].items():
        link = f"[{peer['repository']}](https://github.com/{peer['repository']})"
        rows.append([name, link, peer.get("commit", ""), peer.get("reason", peer["note"])])
    return _markdown(["peer", "repository", "commit", "so that it runs"], rows)


TABLES = {
    "peers": peers,
    "peers_layer": partial(_peers, "layer", ["grad_input", "grad_weight"]),
    "peers_vit": partial(_peers, "vit", ["gradient"]),
    "compile_time": compile_time,
    "families": families,
    "captured": captured,
    "controller": controller,
    "auto": auto,
    "planner": planner,
    "planner_cost": planner_cost,
    "host_time": host_time,
    "functional_vit": functional_vit,
    "real_variance": real_variance,
    "designs": designs,
    "layer_time": layer_time,
    "gpu_layers": gpu_layers,
    "gpu_products": gpu_products,
    "gpu_memory": gpu_memory,
    "gpu_launches": gpu_launches,
    "head": head,
    "gpt": gpt,
    "finetuning": finetuning,
    "attention": attention,
    "memory": memory,
    "regions": regions,
    "depth": lambda: _page_table("depth"),
    "ledgers": lambda: _page_table("ledgers"),
    "trade_off": trade_off,
    "headline": headline,
    "headline-in-short": headline_in_short,
    "early": early,
    **{name: partial(_page_table, name) for name in (*EQUAL_COST, *PAPER)},
    **{f"{name}-terms": partial(_page_table, name, 1) for name in EQUAL_COST},
    **{f"{name}-steps": partial(_page_table, name, 2) for name in EQUAL_COST},
    **{f"{name}-costs": partial(_page_table, name, 1) for name in PAPER},
}


def filled(text: str) -> str:
    """The text with every marked table written anew."""
    return BLOCK.sub(lambda m: m[1] + TABLES[m[2]]() + m[3], text)


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def stale() -> list[Path]:
    """Pages whose tables are not those of the results."""
    return [page for page in pages() if filled(page.read_text()) != page.read_text()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    out_of_date = stale()
    if check and out_of_date:
        raise SystemExit("\n".join(f"stale tables in {page}" for page in out_of_date))
    for page in [] if check else out_of_date:
        page.write_text(filled(page.read_text()))


if __name__ == "__main__":
    main()
