"""Instances in an image by a file of `mpformer export`, without mpformer and torch.

python run_onnx.py model.onnx image.jpg
"""

from __future__ import annotations

import json
import sys

import cv2
import numpy as np
import onnxruntime


def find_instances(session, image, least_score=0.5):
    """[(class name, score, mask [h,w] bool)] of an image [h,w,3] uint8 RGB."""
    notes = session.get_modelmeta().custom_metadata_map
    classes = json.loads(notes["classes"])["classes"]
    [given] = session.get_inputs()
    height, width = given.shape[2:]
    # as large as fits into the upper left corner, the aspect kept
    h, w = image.shape[:2]
    scale = min(height / h, width / w)
    size = (max(1, round(w * scale)), max(1, round(h * scale)))
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    canvas = np.full((height, width, 3), json.loads(notes["pad_color"]), np.uint8)
    canvas[: size[1], : size[0]] = cv2.resize(image, size, interpolation=how)
    images = canvas.transpose(2, 0, 1)[None].astype(np.uint8 if "uint8" in given.type else np.float32)
    class_logits, mask_logits = session.run(["class_logits", "mask_logits"], {"images": images})

    exponents = np.exp(class_logits[0] - class_logits[0].max(1, keepdims=True))
    probabilities = (exponents / exponents.sum(1, keepdims=True))[:, :-1]  # the last one is "no object"
    found = []
    for query, label in zip(*np.nonzero(probabilities >= least_score)):
        if not classes[label]["is_thing"]:
            continue
        logits = cv2.resize(mask_logits[0, query], (width, height), interpolation=cv2.INTER_LINEAR)
        logits = cv2.resize(logits[: size[1], : size[0]], (w, h), interpolation=cv2.INTER_LINEAR)
        mask = logits > 0
        score = probabilities[query, label] * (1 / (1 + np.exp(-logits[mask]))).mean() if mask.any() else 0
        if score >= least_score:
            found.append((classes[label]["name"], float(score), mask))
    return sorted(found, key=lambda one: -one[1])


if __name__ == "__main__":
    opened = onnxruntime.InferenceSession(sys.argv[1])
    picture = cv2.cvtColor(cv2.imread(sys.argv[2]), cv2.COLOR_BGR2RGB)
    for name, score, mask in find_instances(opened, picture):
        print(f"{name}: {score:.3f}, {mask.sum()} pixels")
