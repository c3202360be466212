"""Prune the backbone of an object detector, trained by the detector's own losses.

The backbone alone is given to rbpfx; `forward=` runs the rest of the detector behind it, so that
the noise on its channels is trained on boxes and classes. What leaves the backbone, the features
that the heads read, stays. Then the detector gets the smaller backbone and is trained as ever.

    python examples/detector.py --images coco/val2017 --annotations instances_val2017.json
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from _shared import parser
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.datasets import CocoDetection, wrap_dataset_for_transforms_v2
from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn
from torchvision.transforms import v2

import rbpfx

Batch = tuple[list[Tensor], list[dict[str, Tensor]]]


def main(options: argparse.Namespace) -> None:
    """Prune the backbone, then train the detector."""
    loader = tiny_batches() if options.tiny else coco(options)
    settings: dict[str, Any] = {"weights": "DEFAULT"}
    if options.tiny:
        settings = {"weights": None, "weights_backbone": None, "min_size": 64, "num_classes": 3}
        settings |= {"rpn_post_nms_top_n_train": 20, "box_batch_size_per_image": 8}
    detector = fasterrcnn_mobilenet_v3_large_320_fpn(**settings).to(options.device)

    def loss(backbone: nn.Module, batch: Batch) -> Tensor:
        images, targets = detector.transform(*batch)
        features = backbone(images.tensors)
        proposals, first = detector.rpn(images, features, targets)
        _, second = detector.roi_heads(features, proposals, images.image_sizes, targets)
        return sum({**first, **second}.values())

    detector.train().requires_grad_(False)  # the heads, while the backbone is trained
    detector.backbone.requires_grad_(True)
    result = rbpfx.prune(
        detector.backbone,
        loader,
        forward=loss,
        target=rbpfx.Target(macs=options.macs, include=[options.layers]),
        recursion=rbpfx.Recursion(epochs=options.epochs, weight_lr=options.lr),
        recovery=rbpfx.FineTune(epochs=0),
        progress=not options.tiny,
    )
    print(result.report)

    detector.backbone = result.model
    detector.train().requires_grad_(True)
    optimizer = torch.optim.SGD(detector.parameters(), options.lr, momentum=0.9, weight_decay=1e-4)
    for _ in range(options.epochs):
        for images, targets in loader:
            images = [image.to(options.device) for image in images]
            targets = [{k: x.to(options.device) for k, x in t.items()} for t in targets]
            optimizer.zero_grad()
            sum(detector(images, targets).values()).backward()
            nn.utils.clip_grad_norm_(detector.parameters(), 10.0)
            optimizer.step()
    detections = detector.eval()([images[0]])[0]
    print(f"{len(detections['boxes'])} boxes in the last image")


def coco(options: argparse.Namespace) -> DataLoader:
    """Batches of COCO images that hold a box."""
    transforms = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
    images = CocoDetection(options.images, options.annotations, transforms=transforms)
    wrapped = wrap_dataset_for_transforms_v2(images, target_keys=("boxes", "labels"))
    boxed = [i for i, key in enumerate(images.ids) if images.coco.getAnnIds(key)]
    subset = torch.utils.data.Subset(wrapped, boxed)
    return DataLoader(subset, 8, True, collate_fn=lambda b: tuple(map(list, zip(*b, strict=True))))


def tiny_batches() -> list[Batch]:
    """Two batches of two noisy images, each with one bright square."""
    batches = []
    for label in (1, 2):
        images = [torch.rand(3, 64, 64) / 2 for _ in range(2)]
        for image in images:
            image[:, 8:40, 8:40] += 0.5
        box = {"boxes": torch.tensor([[8.0, 8.0, 40.0, 40.0]]), "labels": torch.tensor([label])}
        batches.append((images, [box, box]))
    return batches


if __name__ == "__main__":
    arguments = parser(__doc__)
    arguments.add_argument("--images", help="folder of images")
    arguments.add_argument("--annotations", help="COCO annotations of their boxes")
    arguments.add_argument("--macs", type=float, default=0.6, help="share of the backbone to keep")
    arguments.add_argument("--layers", default="*", help="pattern of the layers that may shrink")
    arguments.add_argument("--epochs", type=int, default=3, help="of noise, and of fine-tuning")
    arguments.add_argument("--lr", type=float, default=0.005)
    arguments.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = arguments.parse_args()
    if options.tiny:
        options.device, options.epochs = "cpu", 1
        options.layers, options.macs = "body.1[0-2]*", 0.9
    elif options.images is None or options.annotations is None:
        arguments.error("--images and --annotations are needed, or --tiny")
    main(options)
