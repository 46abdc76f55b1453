"""The table of docs/mm.md: published figures beside the parameters and multiply-accumulates of our configurations."""

import csv
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

BEGIN, END = "<!-- mm table: begin -->", "<!-- mm table: end -->"
PROPOSALS, DETECTIONS = 1000, 100  # of one image, for which the published counts hold


def build_on_meta(config: Config) -> nn.Module:
    """The network of a configuration without memory for its weights, which are not looked for."""
    setting = config.model.copy()
    setting.backbone = {**setting.backbone, "pretrained": False}
    with DefaultScope.overwrite_default_scope(config.default_scope), torch.device("meta"):
        return MODELS.build(setting).eval()


def image_size(config: Config) -> tuple[int, int]:
    """Rows and columns for which the papers count: 800 and 1280 for COCO, for ADE20K a crop with Semantic FPN and four
    side by side with UPerNet.
    """
    if config.default_scope == "mmdet":
        return 800, 1280
    side = config.model.data_preprocessor["size"][0]
    return (side, side) if config.model.get("neck") else (side, 4 * side)


def _boxes_and_masks(model: Any) -> None:
    """Run the second stage on the proposals of one image."""
    roi_head = model.roi_head
    heads = [roi_head.bbox_head] if not hasattr(roi_head, "num_stages") else roi_head.bbox_head
    masks = [roi_head.mask_head] if not hasattr(roi_head, "num_stages") else roi_head.mask_head
    for head in heads:
        head(torch.empty(PROPOSALS, 256, 7, 7, device="meta"))
    for head in masks:
        head(torch.empty(DETECTIONS, 256, 14, 14, device="meta"))


def measure(config: Config) -> tuple[int, int]:
    """Parameters, and multiply-accumulates of one image, of a configuration's network with all its heads.

    Args:
        config: A file of ``configs/mm``.

    Returns:
        Both counts. The auxiliary head of UPerNet has parameters but does not run on an image.
    """
    model: Any = build_on_meta(config)
    image: Tensor = torch.empty(1, 3, *image_size(config), device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        maps = model.extract_feat(image)
        if config.default_scope == "mmseg":
            model.decode_head(maps)
        elif hasattr(model, "roi_head"):
            model.rpn_head(maps)
            _boxes_and_masks(model)
        else:
            model.bbox_head(maps)
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2


def update_figures(root: Path) -> None:
    """Measure every configuration that ``docs/mm.csv`` names and write the figures there."""
    path = root / "docs" / "mm.csv"
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        parameters, macs = measure(Config.fromfile(root / "configs" / "mm" / f"{row['config']}.py"))
        row.update(params_m=f"{parameters / 1e6:.1f}", macs_g=f"{macs / 1e9:.0f}")
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    temporary.replace(path)


def page_with_table(root: Path) -> str:
    """``docs/mm.md`` with the table of ``docs/mm.csv``."""
    page = (root / "docs" / "mm.md").read_text(encoding="utf-8")
    with (root / "docs" / "mm.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    lines = [
        "| configuration | published: params, FLOPs | box AP | mask AP | mIoU (multi-scale) | here: params, MACs |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        published = ", ".join(filter(None, (row["published_params"], row["published_flops"]))) or "-"
        scales = f" ({row['miou_ms']})" if row["miou_ms"] else ""
        miou = f"{row['miou'] or '-'}{scales}"
        cells = (row["box_ap"] or "-", row["mask_ap"] or "-", miou, f"{row['params_m']} M, {row['macs_g']} G")
        lines.append(f"| `{row['config']}` | {published} | {' | '.join(cells)} |")
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n" + "\n".join(lines) + f"\n{END}" + rest.partition(END)[2]
