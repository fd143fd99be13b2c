"""The nearest right name, for messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_ELSEWHERE: dict[str, str] = {
    # settings
    "train.length": "epoch epochs max_epoch max_epochs num_epochs steps max_steps num_steps iterations iters "
    "max_iter max_iters num_iterations duration",
    "train.lr": "learning_rate base_lr lr0 initial_lr",
    "train.batch_size": "batch bs ims_per_batch images_per_batch samples_per_gpu",
    "train.weight_decay": "wd",
    "train.clip_norm": "grad_clip gradient_clip gradient_clip_val max_grad_norm clip_grad_norm",
    "train.schedule": "scheduler lr_scheduler lr_schedule lr_config",
    "train.resume_from": "resume",
    "train.init": "resume weights checkpoint load_from finetune_from",
    "train.precision": "amp mixed_precision fp16 half",
    "train.checkpoint_every": "save_every save_period save_steps checkpoint_period checkpoint_interval",
    "evaluate.every": "eval_every eval_period eval_interval eval_steps val_every val_interval",
    "cluster.workers": "gpus num_gpus ngpus world_size",
    "cluster.gpu": "device devices accelerator cuda",
    "data.loader_processes": "num_workers dataloader_num_workers",
    "data.root": "data_dir data_path data_root dataset_root",
    "data.augment.size": "image_size img_size imgsz input_size crop_size",
    "data.augment.flip": "hflip fliplr horizontal_flip random_flip flip_prob",
    "model.decoder.queries": "num_queries num_object_queries",
    "model.pixel_decoder.channels": "hidden_dim conv_dim mask_dim",
    "storage": "out output_dir save_dir work_dir log_dir project",
    # their values
    "bn": "batch_norm batchnorm batch_normalization batchnorm2d sync_bn syncbn",
    "frozen_bn": "frozen_batch_norm frozenbn frozen_batchnorm frozenbatchnorm2d frozen",
    "group_norm": "gn groupnorm group_normalization",
    "instance": "instances ins instance_segmentation detection segm",
    "panoptic": "pan panoptics panoptic_segmentation pan_seg",
    "semantic": "semantics semantic_segmentation sem_seg semseg segmentation",
    "float32": "fp32 float single 32",
    "bfloat16": "bf16 fp16 half float16 amp 16",
    "adamw": "adam",
    "poly": "cosine cos linear polynomial poly_lr",
    "step": "multistep multi_step step_lr steplr",
    "torch": "pytorch dataloader",
    "large_scale_jitter": "lsj",
    "coco_instance": "coco coco_instances",
}
"""What other programs call a setting or a value of ours."""
_OURS = {
    other: [ours for ours, names in _ELSEWHERE.items() if other in names.split()]
    for names in _ELSEWHERE.values()
    for other in names.split()
}


def nearest(wrong: str, names: Iterable[str], sections: bool = False) -> str:
    """The name of the same thing where `wrong` is what other programs call it, else the most similar one.

    With `sections`, dotted prefixes of names are candidates, too.
    """
    candidates = set(names)
    if sections:
        for name in list(candidates):
            parts = name.split(".")
            candidates.update(".".join(parts[:i]) for i in range(1, len(parts)))
    depth = wrong.count(".")
    last = wrong.rsplit(".", 1)[-1]
    for ours in _OURS.get(last.casefold().replace("-", "_"), ()):
        if ours in candidates:
            return ours

    def likeness(name: str) -> tuple[float, int, str]:
        whole = difflib.SequenceMatcher(None, wrong, name).ratio()
        end = difflib.SequenceMatcher(None, last, name.rsplit(".", 1)[-1]).ratio()
        return (whole + end, -abs(name.count(".") - depth), name)

    return max(candidates, key=likeness, default="none")
