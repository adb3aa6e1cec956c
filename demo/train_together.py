"""Train a base and its memory together on the loss of their mixture: a LoRA adapter on the base, all of the memory.

    python -m demo.train_together --model_name_or_path BASE --knn_generator_path MEMORY \\
        --dataset_name WINDOWS --output_dir OUTPUT

The mixture is differentiable (paper, section 3.4): the gradient reaches the base through its own share and through the
hidden state that the memory reads. `MLPMemory.from_pretrained` opens OUTPUT, with the adapter merged into the base.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from utils.cli import command, flag, parse, required, say
from utils.loading import BaseArguments


@dataclass(kw_only=True)
class TogetherArguments(BaseArguments):
    """Models, data and training settings."""

    knn_generator_path: str = required("MLP memory: a folder or a hub name")
    dataset_name: str = required("windows folder made by utils/preprocess_dataset.py")
    dataset_split_name: str = flag("train", "split to train on")
    output_dir: str = flag("output/together", "folder for the joint model; must not exist yet")
    lmbda: float = flag(0.25, "weight of the memory in the mixture, 0 to 1")
    lora_rank: int = flag(16, "rank of the adapter on the base's linear layers")
    learning_rate: float = flag(1e-4, "learning rate of adapter and memory")
    max_train_steps: int = flag(200, "number of training steps")
    per_device_train_batch_size: int = flag(4, "windows per step")
    seed: int = flag(42, "random seed of the adapter's weights and the order of the windows")


def main() -> None:
    (arguments,) = parse(TogetherArguments, description=__doc__.split("\n")[0])
    import torch
    from peft import LoraConfig, get_peft_model

    from utils.loading import load_windows, quiet_libraries
    from utils.memories import open_joint

    os.makedirs(arguments.output_dir)  # not one that holds something else
    quiet_libraries()
    torch.manual_seed(arguments.seed)
    windows = load_windows(arguments.dataset_name, arguments.dataset_split_name).with_format("torch")
    lora = LoraConfig(r=arguments.lora_rank, target_modules="all-linear", task_type="CAUSAL_LM")
    base = get_peft_model(arguments.open_base(arguments.open_tokenizer()), lora)  # freezes all but the adapter
    joint = open_joint(arguments, arguments.knn_generator_path, base, arguments.lmbda).train()
    trained = [weight for weight in joint.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=arguments.learning_rate, weight_decay=0.0)
    for step in range(1, arguments.max_train_steps + 1):
        chosen = windows[torch.randint(len(windows), (arguments.per_device_train_batch_size,)).tolist()]
        batch = {name: chosen[name].to(base.device) for name in ("input_ids", "labels")}  # (batch, time)
        loss = joint(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        say(f"step {step}: loss {loss.item():.4f}")
    joint.eval().save_pretrained(arguments.output_dir)


if __name__ == "__main__":
    command(main)()
