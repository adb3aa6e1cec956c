"""Train a base and its memory together, by the loss of their mixture: a LoRA adapter on the base, all of the memory.

    python -m demo.train_together --model_name_or_path BASE --knn_generator_path MEMORY \\
        --dataset_name WINDOWS --output_dir OUTPUT

The mixture is differentiable from end to end (paper, section 3.4): the gradient reaches the base by its own share and
through the hidden state that the memory reads. OUTPUT opens by `MLPMemory.from_pretrained`, the adapter merged in its base.
"""

from __future__ import annotations

from dataclasses import dataclass

from utils.cli import command, flag, parse, required, say
from utils.errors import InputError, check_at_least, check_fraction, check_positive, check_seed
from utils.files import ensure_folder
from utils.loading import BaseArguments


@dataclass(kw_only=True)
class TogetherArguments(BaseArguments):
    """What is trained, on what, and how far."""

    knn_generator_path: str = required("the memory: a folder or a hub name")
    dataset_name: str = required("windows folder made by utils/preprocess_dataset.py")
    dataset_split_name: str = flag("train", "split to train on")
    output_dir: str = flag("output/together", "folder of the joint model")
    lmbda: float = flag(0.25, "weight of the memory in the mixture, 0 to 1")
    lora_rank: int = flag(16, "rank of the adapter on the base's linear layers")
    learning_rate: float = flag(1e-4, "learning rate of adapter and memory")
    max_train_steps: int = flag(200, "steps to train")
    per_device_train_batch_size: int = flag(4, "windows of a step")
    seed: int = flag(42, "of the adapter's first weights and the windows' order")


def main() -> None:
    (arguments,) = parse(TogetherArguments, description=__doc__.split("\n")[0])
    check_at_least(1, arguments, "lora_rank", "max_train_steps", "per_device_train_batch_size")
    check_fraction("--lmbda", arguments.lmbda)
    check_positive("--learning_rate", arguments.learning_rate)
    check_seed("--seed", arguments.seed)
    output = ensure_folder(arguments.output_dir)
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise InputError("needs the package peft; pip install peft") from None
    import torch

    from models import MLPMemory
    from models.joint_files import taken
    from utils.loading import load_windows, quiet_libraries
    from utils.memories import open_memory_of

    if told := taken(output):
        raise InputError(f"--output_dir {told}")
    quiet_libraries()
    torch.manual_seed(arguments.seed)
    windows = load_windows(arguments.dataset_name, arguments.dataset_split_name).with_format("torch")
    base = arguments.open_base(arguments.open_tokenizer())
    memory = open_memory_of(arguments, arguments.knn_generator_path, base)
    lora = LoraConfig(r=arguments.lora_rank, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(base, lora)  # freezes all of the base but the adapter
    joint = MLPMemory(adapted, memory, arguments.lmbda, layer_position=arguments.layer_position).train()
    trained = [weight for weight in joint.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=arguments.learning_rate, weight_decay=0.0)
    for step in range(1, arguments.max_train_steps + 1):
        chosen = torch.randint(len(windows), (arguments.per_device_train_batch_size,)).tolist()
        batch = {name: windows[chosen][name].to(base.device) for name in ("input_ids", "labels")}  # (batch, time)
        loss = joint(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        say(f"step {step}: loss {loss.item():.4f}")
    joint.eval().save_pretrained(output)


if __name__ == "__main__":
    command(main)()
