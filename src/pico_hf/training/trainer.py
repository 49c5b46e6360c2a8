"""What the stock Trainer cannot do: score a whole retrieval split, and refine prototypes by it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput, HubStrategy
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME

from pico_hf.cards.publishing import copy_model_files, write_run_card
from pico_hf.core.canonical import CANDIDATES
from pico_hf.core.prototypes import Refinement
from pico_hf.core.semantic import ColumnStatistics, column_statistics, column_weights
from pico_hf.data.collator import PicoCollator
from pico_hf.data.dataset import ImageTextDataset
from pico_hf.encoders.tokens import projection_parameters
from pico_hf.hub.adapter_files import CARRIED, save_companions
from pico_hf.hub.adapter_loading import check_weights
from pico_hf.hub.files import check_safetensors, read_tensors
from pico_hf.modeling_pico import PicoModel
from pico_hf.training.callbacks import PrototypeFeedbackCallback
from pico_hf.training.evaluation import (
    SplitEncoder,
    evaluate_form,
    evaluate_retrieval,
    own_columns,
    pair_moments,
)
from pico_hf.training.feature_cache import CachedImageTextDataset, cache_token_features
from pico_hf.training.splits import as_pairs, check_dev_split, check_train_split, trial_part
from pico_hf.training_args import PicoTrainingArguments


class PicoTrainer(Trainer):
    """`transformers.Trainer` for [`PicoModel`]: whole-split metrics and prototype feedback.

    Args:
        model: The model to train, plain or wrapped by peft.
        args: The run's knobs.
        train_dataset: Rows of an image and its captions: a `datasets.Dataset` with image and
            caption columns, or an `ImageTextDataset`.
        eval_dataset: The dev split, likewise; in a dict of splits the first one gives the feedback.
            Never the test split: prototypes and checkpoints are chosen by it.
        processing_class: Processor of images and captions; the default collator is made from it.
        data_collator: Rows to batch; None makes a [`PicoCollator`].
        callbacks: More callbacks.
        kwargs: What else `Trainer` takes.

    Raises:
        ValueError: If the dev split has fewer than 10 images, or the training split fewer rows than
            a batch.
    """

    args: PicoTrainingArguments

    def __init__(
        self,
        model: PicoModel | nn.Module,
        args: PicoTrainingArguments,
        train_dataset: datasets.Dataset | Dataset | None = None,
        eval_dataset: datasets.Dataset | Dataset | Mapping[str, Any] | None = None,
        processing_class: Any = None,
        data_collator: Any = None,
        callbacks: list | None = None,
        **kwargs: Any,
    ) -> None:
        train, dev = (
            _each(lambda rows: as_pairs(rows, args.seed), splits)
            for splits in (train_dataset, eval_dataset)
        )
        if train is not None:
            check_train_split(train, args)
        _each(check_dev_split, dev)
        _check_adapter(model, args)
        if args.freeze_encoder:
            base_model(model).freeze_towers()
        super().__init__(
            model=model,
            args=args,
            train_dataset=train,
            eval_dataset=dev,
            processing_class=processing_class,
            data_collator=data_collator
            or PicoCollator(processing_class, config=base_model(model).config),
            callbacks=callbacks,
            **kwargs,
        )
        if args.freeze_encoder:
            self.train_dataset = _each(self._cache, train)
            self.eval_dataset = _each(self._cache, dev)
        if train is not None and args.refine_prototypes:
            self._fit_probe()
        # First, so that whoever uploads the model when training ends finds it aligned.
        self.callback_handler.callbacks.insert(0, PrototypeFeedbackCallback(self))

    def _fit_probe(self) -> None:
        """Sizes the prototypes' buffers before a checkpoint may be loaded into them."""
        model = self.pico_model
        if not model.prototypes.canonical and model.config.probe_size > len(self.train_dataset):
            self.restart_prototypes()

    # ---- feedback -------------------------------------------------------------------------

    @property
    def pico_model(self) -> PicoModel:
        """The PicoModel inside whatever wraps it."""
        return base_model(self.accelerator.unwrap_model(self.model))

    @property
    def dev_split(self) -> ImageTextDataset:
        """The split that feedback and checkpoint selection use."""
        splits = self.eval_dataset
        return next(iter(splits.values())) if isinstance(splits, Mapping) else splits

    @property
    def feedback_metric(self) -> str:
        """Name of the dev split's rSum in the metrics."""
        splits = self.eval_dataset
        return f"eval_{next(iter(splits))}_rsum" if isinstance(splits, Mapping) else "eval_rsum"

    def restart_prototypes(self) -> None:
        """Forgets prototypes and feedback; the first pairs of the training split are the probe."""
        size = min(self.pico_model.config.probe_size, len(self.train_dataset))
        self.pico_model.restart_prototypes(size)

    def refine_prototypes(self) -> None:
        """One iteration of style prototypes, or one alignment of canonical columns.

        Either takes statistics of training pairs, tries what follows from them on the dev split,
        the network frozen, and fuses it by what it brought. It needs no training: with an encoder
        as it is, `train_dataset` and `eval_dataset` are all it looks at. Without the latter, as
        with a handful of pairs, all candidates for canonical columns count alike. Checkpoints of a
        run hold the network before its alignment; `save_model` saves it aligned.
        """
        model = self.pico_model
        if model.prototypes.canonical:
            for report in self._align_columns():
                self._log_refinement(report)
            return
        dev = self._split_encoder().split(self.dev_split, "Feedback trial")

        def trial(probability: Tensor) -> float:
            return evaluate_retrieval(model, dev, column_weights(probability))["rsum"]

        self._log_refinement(model.prototypes.refine(self.probe_statistics(), trial))

    def _align_columns(self) -> list[Refinement]:
        model, encoder = self.pico_model, self._split_encoder()
        if self.train_dataset is None:
            raise ValueError("Canonical columns come from pairs: give `train_dataset`.")
        moments = pair_moments(encoder, self.train_dataset.sample(self.args.alignment_images))
        if self.eval_dataset is None:
            return model.prototypes.align(moments)
        dev = encoder.split(trial_part(self.dev_split), "Feedback trials", own_columns)

        def trial(form: Tensor) -> float:
            return evaluate_form(model, dev, form)["rsum"]

        trials = tqdm(CANDIDATES, "Feedback trials", disable=self.args.disable_tqdm, leave=False)
        return model.prototypes.align(moments, trial, trials)

    def _log_refinement(self, report: Refinement) -> None:
        weights = self.pico_model.column_weights
        self.log(
            {
                "pico_iteration": report.iteration,
                "pico_feedback": report.gain,
                "pico_fused_weight": report.fused_weight,
                "pico_weight_std": float(weights.std(correction=0)),
                "pico_weight_min": float(weights.min()),
                "pico_weight_max": float(weights.max()),
            }
        )

    def probe_statistics(self) -> ColumnStatistics:
        """Column statistics of the probe set: first training rows, first captions, fixed order."""
        probe = self.train_dataset.probe(self.pico_model.config.probe_size)
        batches = self._split_encoder().batches(probe, "Probe statistics")
        return ColumnStatistics.concatenate([column_statistics(*pair) for pair in batches])

    # ---- scoring a split ------------------------------------------------------------------

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Embeds the whole split once and ranks all of it against all of it.

        Args:
            dataloader: Its dataset is the split.
            description: Text of the progress bar.
            prediction_loss_only: Ignored: retrieval has no per-batch loss worth reporting.
            ignore_keys: Ignored.
            metric_key_prefix: Prefix of the metric names.

        Returns:
            Metrics `{prefix}_i2t_r1` … `{prefix}_rsum` in percent.
        """
        split = self._split_encoder().split(dataloader.dataset, description)
        metrics = evaluate_retrieval(self.pico_model, split)
        named = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        return EvalLoopOutput(None, None, metrics=named, num_samples=len(split.images))

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Takes raw rows too, as `evaluate(test_dataset)` gets them."""
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            eval_dataset = as_pairs(eval_dataset, self.args.seed)
            eval_dataset = self._cache(eval_dataset) if self.args.freeze_encoder else eval_dataset
        return super().get_eval_dataloader(eval_dataset)

    def _split_encoder(self) -> SplitEncoder:
        return SplitEncoder(
            self.pico_model,
            self.data_collator,
            batch_size=self.args.per_device_eval_batch_size,
            num_workers=self.args.dataloader_num_workers,
            disable_tqdm=self.args.disable_tqdm,
        )

    # ---- files ----------------------------------------------------------------------------

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        """Refuses damaged weights before the live model changes."""
        for file in sorted(Path(resume_from_checkpoint).glob("*.safetensors")):
            check_safetensors(file)
        adapter = Path(resume_from_checkpoint) / ADAPTER_SAFE_WEIGHTS_NAME
        if self.pico_model is not self.model and adapter.exists():
            check_weights(self.model, read_tensors(adapter))
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Adds to a saved adapter what peft does not know: prototypes and configuration."""
        super()._save(output_dir, state_dict)
        if self.args.should_save and self.pico_model is not self.model:
            save_companions(self.pico_model, output_dir or self.args.output_dir)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Makes the pushed folder whole first: prototypes, page and plots of this very moment."""
        running = self.push_in_progress is not None and not self.push_in_progress.is_done()
        skipped = running and not self.args.hub_always_push  # an upload is reading the folder
        wanted = self.args.hub_strategy != HubStrategy.END and not skipped
        if self.is_world_process_zero() and wanted:
            copy_model_files(Path(checkpoint_folder), Path(self.args.output_dir))
            self.create_model_card()
        super()._push_from_checkpoint(checkpoint_folder)

    def create_model_card(self, model_name: str | None = None, **kwargs: Any) -> None:
        """Writes a model card with the run's numbers and plots; a card of the user stays unchanged.

        Args:
            model_name: Title; None takes the name of the repository or of the output folder.
            kwargs: Of `Trainer.create_model_card`: `language`, `license` and `tags` are used.
        """
        if not self.is_world_process_zero():
            return
        metadata = {key: kwargs.get(key) or None for key in ("language", "license", "tags")}
        best = not self.is_in_train and self.args.load_best_model_at_end
        folder = Path(self.args.output_dir)
        write_run_card(
            folder, self.pico_model, self.args, self.state, best=best, name=model_name, **metadata
        )

    # ---- training -------------------------------------------------------------------------

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Hands the warm-up's ramp to the model; see `Trainer.compute_loss` for the arguments."""
        epoch, warmup = self.state.epoch or 0.0, self.args.prototype_warmup_epochs
        ramp = epoch / warmup if epoch < warmup else None
        return super().compute_loss(
            model, {**inputs, "loss_ramp": ramp}, return_outputs, num_items_in_batch
        )

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The chosen optimizer, with a lower learning rate for towers than for heads."""
        if self.optimizer is None:
            chosen = self.model if model is None else model
            optimizer, options = self.get_optimizer_cls_and_kwargs(self.args, chosen)
            self.optimizer = optimizer(self._parameter_groups(chosen), **options)
        return self.optimizer

    def _parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        decayed = set(self.get_decay_parameter_names(model))
        towers = _tower_parameters(base_model(model))
        # An adapter's matrices start from nothing like new heads, not from what the towers learned.
        share = 1 if base_model(model) is not model else 10
        tower_rate = self.args.tower_learning_rate or self.args.learning_rate / share
        groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                key = (id(parameter) in towers, name in decayed)
                groups.setdefault(key, []).append(parameter)
        return [
            {
                "params": parameters,
                "lr": tower_rate if tower else self.args.learning_rate,
                "weight_decay": self.args.weight_decay if decay else 0.0,
            }
            for (tower, decay), parameters in groups.items()
        ]

    def _cache(self, rows: ImageTextDataset) -> ImageTextDataset:
        if isinstance(rows, CachedImageTextDataset):
            return rows
        # Names with an underscore are never pushed.
        folder = self.args.feature_cache_dir or Path(self.args.output_dir) / "_feature_cache"
        return cache_token_features(self._split_encoder(), rows, Path(folder))


def base_model(model: nn.Module) -> PicoModel:
    """The PicoModel inside a peft wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _tower_parameters(model: PicoModel) -> set[int]:
    """Identities of the encoder's parameters that come before the hidden states."""
    heads = set(projection_parameters(model.encoder))
    return {id(p) for name, p in model.encoder.named_parameters() if name not in heads}


def _each(function: Any, splits: Any) -> Any:
    """Applies a function to one split, to each of a dict of splits, or to none."""
    if isinstance(splits, Mapping):
        return {name: function(split) for name, split in splits.items()}
    return None if splits is None else function(splits)


def _check_adapter(model: nn.Module, args: PicoTrainingArguments) -> None:
    """Prototypes are buffers: an adapter that does not list them would lose them in silence."""
    pico = base_model(model)
    if pico is not model and args.refine_prototypes:
        for name in CARRIED:
            if not hasattr(getattr(pico, name), "modules_to_save"):
                raise ValueError(
                    f"The adapter does not carry `{name}`, which would be lost when it is saved. "
                    f"Add {name!r} to its `modules_to_save`, or use `pico_hf.pico_lora_config`."
                )
