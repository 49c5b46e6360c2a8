"""What the stock Trainer cannot do: score a whole retrieval split, and refine prototypes by it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers.trainer_utils import EvalLoopOutput, HubStrategy, TrainOutput

from pico_hf.cards.publishing import copy_model_files, write_run_card
from pico_hf.core.processes import Processes
from pico_hf.data.collator import PicoCollator
from pico_hf.data.dataset import ImageTextDataset
from pico_hf.hub.adapter_files import base_model, live_module
from pico_hf.hub.saving import save_companions
from pico_hf.hub.weights import refuse_mixture
from pico_hf.modeling_pico import PicoModel
from pico_hf.training import distributed
from pico_hf.training.cache_folder import default_cache_dir
from pico_hf.training.cached_gradients import CachedGradients
from pico_hf.training.closed_form import ClosedFormCallback
from pico_hf.training.device_refusals import check_devices
from pico_hf.training.encoding import SplitEncoder
from pico_hf.training.feature_cache import cache_token_features
from pico_hf.training.feedback import Feedback
from pico_hf.training.feedback_callback import FeedbackCallback
from pico_hf.training.feedback_log import log_entry
from pico_hf.training.loss_parts import LossPartsTrainer
from pico_hf.training.model_calls import loss_of_batch, train_tokens_too, without_options
from pico_hf.training.optimizer import grouped_options
from pico_hf.training.predictions import predicted, ranked
from pico_hf.training.refusals import (
    check_arguments,
    check_combinations,
    check_mini_batches,
    check_model,
)
from pico_hf.training.reporting import ReportCallback
from pico_hf.training.sharding import ShardingTrainer, on_whole_model
from pico_hf.training.splits import (
    as_pairs,
    check_best_metric,
    dev_splits,
    each,
    fit_to_splits,
    train_split,
)
from pico_hf.training.zero import ZeroTrainer
from pico_hf.training_args import PicoTrainingArguments


class PicoTrainer(LossPartsTrainer, ZeroTrainer, ShardingTrainer):
    """`transformers.Trainer` for [`PicoModel`]: whole-split metrics and prototype feedback.

    Args:
        model: The model to train, plain or wrapped by peft.
        args: The run's knobs.
        train_dataset: Rows of an image and its captions: a `datasets.Dataset` with image and
            caption columns, or an `ImageTextDataset`. Or a stream of such rows: a
            `datasets.IterableDataset` or an `ImageTextStream`, which need `max_steps`.
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
    feedback_class: Callable[..., Feedback] = Feedback
    # The losses of a step are means over their batches, and so is one of `compute_loss_func`.
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: PicoModel | nn.Module | None = None,
        args: PicoTrainingArguments | None = None,
        train_dataset: datasets.Dataset | Dataset | None = None,
        eval_dataset: datasets.Dataset | Dataset | Mapping[str, Any] | None = None,
        processing_class: Any = None,
        data_collator: Any = None,
        callbacks: list | None = None,
        **kwargs: Any,
    ) -> None:
        args = PicoTrainingArguments() if args is None else args
        check_arguments(args)
        optimizers = kwargs.get("optimizers", (None, None))
        check_combinations(args, model, kwargs.get("model_init"), data_collator, optimizers)
        train = None if train_dataset is None else train_split(train_dataset, args)
        dev = dev_splits(eval_dataset, args)
        args = fit_to_splits(args, train, dev)
        if kwargs.get("compute_metrics") is None:  # else any name may be among its metrics
            check_best_metric(args, dev)
        if model is not None:
            self._prepare(model, args)
            if train is not None:
                check_devices(args, model)
            data_collator = data_collator or self._collator(processing_class, model)
        if kwargs.get("model_init") is not None:
            kwargs["model_init"] = without_options(kwargs["model_init"])
        super().__init__(
            model=model,
            args=args,
            train_dataset=train,
            eval_dataset=dev,
            processing_class=processing_class,
            data_collator=data_collator,
            callbacks=callbacks,
            **kwargs,
        )
        if data_collator is None:  # only now is there the model of `model_init`
            self.data_collator = self._collator(processing_class, self.model)
        if args.freeze_encoder:
            self.train_dataset = each(self._cache, train)
            self.eval_dataset = each(self._cache, dev)
        # First, so that whoever uploads the model when training ends finds it aligned.
        callback = FeedbackCallback(lambda: self.feedback, self.construct_prototypes, self.evaluate)
        report = ReportCallback(lambda: self.pico_model, lambda: self.callback_handler.callbacks)
        self.callback_handler.callbacks[:0] = [callback, report]
        self.add_callback(ClosedFormCallback(lambda: self.feedback))
        self.add_callback(distributed.BatchStatisticsCallback(self.processes))

    @staticmethod
    def _prepare(model: nn.Module, args: PicoTrainingArguments) -> None:
        """Checks a model and freezes its towers if that is wanted."""
        check_model(model, args)
        if args.freeze_encoder:
            base_model(model).freeze_towers()
        check_mini_batches(args, model)

    @staticmethod
    def _collator(processing_class: Any, model: nn.Module) -> PicoCollator:
        return PicoCollator(processing_class, config=base_model(model).config)

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """Checks what `model_init` gives, see `Trainer.call_model_init`."""
        model = super().call_model_init(trial)
        self._prepare(model, self.args)
        if getattr(self, "train_dataset", None) is not None:  # stock code sets it later
            self._fit_probe(model)
        return model

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Trains; see `Trainer.train` for the arguments.

        `ignore_keys_for_eval` has no effect, since an evaluation keeps no outputs of batches.
        """
        refuse_mixture(self.args.output_dir, adapter=self.pico_model is not self.model)
        self.args = fit_to_splits(self.args, self.train_dataset, self.eval_dataset)
        return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def _before_loading(self) -> None:
        if self.train_dataset is not None:
            self._fit_probe(self.pico_model)

    def _fit_probe(self, model: nn.Module) -> None:
        """Readies a model for a run, or for a checkpoint to be loaded: what is trained, buffers."""
        train_tokens_too(base_model(model))
        feedback = replace(
            self.feedback, encoder=replace(self.split_encoder, model=base_model(model))
        )
        if feedback.too_few_pairs and feedback.starts_afresh and feedback.proposes("training"):
            feedback.restart()

    @property
    def pico_model(self) -> PicoModel:
        """The PicoModel inside whatever wraps it."""
        return base_model(self.accelerator.unwrap_model(self.model))

    @property
    def processes(self) -> Processes:
        """The processes that train one model."""
        return Processes.all()

    @property
    def feedback(self) -> Feedback:
        """Builds and judges column weights with the model and the splits that are here now."""
        return self.feedback_class(
            self.split_encoder, self.train_dataset, self.eval_dataset, self.args
        )

    @property
    def feedback_metric(self) -> str:
        """Name of the dev split's rSum in the metrics of a run."""
        return self.feedback.metric

    @on_whole_model
    def construct_prototypes(self, when: str | None = None) -> None:
        """Lets the model's estimators propose how to score, and takes what helps on the dev split.

        Statistics of training pairs give proposals; each is tried on the dev split, the network
        frozen, and fused by what it brought; what scores less than what is there is not taken. It
        needs no training: with an encoder as it is, `train_dataset` and `eval_dataset` are all it
        looks at. Without the latter, as with a handful of pairs, all proposals count alike.
        Checkpoints of a run hold the network before its end; `save_model` saves it as it ends.

        Args:
            when: `"training"`: those that propose at every evaluation of a run, style prototypes.
                `"end"`: those that propose when it is over, canonical columns and the share of
                pooled vectors. None: the latter, or all of a model that has none of them.
        """
        found = self.feedback.construct(when)
        self.processes.copy_from_first(live_module(self.pico_model.prototypes).buffers())
        for refinement in found:
            self.log(log_entry(refinement))

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
            prediction_loss_only: True keeps no scores, unless `compute_metrics` needs them. There
                is no loss of an evaluation.
            ignore_keys: Has no effect: there are no outputs of batches.
            metric_key_prefix: Prefix of the metric names.

        Returns:
            Metrics `{prefix}_i2t_r1` … `{prefix}_rsum` in percent, `{prefix}_encoder_rsum` and so
            on of the encoder's own cosine, and those of `compute_metrics`; of a prediction also all
            scores (images, texts), -inf across galleries, and the image (texts,) of each caption.
        """
        split = self.split_encoder.split(dataloader.dataset, description)
        if prediction_loss_only and self.compute_metrics is None:
            output = ranked(self.pico_model, split, metric_key_prefix)
        else:
            user = self.compute_metrics, self.preprocess_logits_for_metrics
            output = predicted(self.pico_model, split, metric_key_prefix, *user)
        return output._replace(metrics=self.processes.same(output.metrics))

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Takes raw rows too, as `evaluate(test_dataset)` gets them."""
        splits: Any = self.eval_dataset
        if isinstance(eval_dataset, str):
            eval_dataset = splits[eval_dataset]
        elif eval_dataset is None:
            eval_dataset = splits
        if eval_dataset is None:
            return super().get_eval_dataloader()  # which says what is missing
        return self.get_test_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        """Takes raw rows too, as `predict(test_dataset)` gets them.

        The loader stands for its data set: `evaluation_loop` goes through images and captions by
        loaders of its own. A kept one, as stock code does with persistent workers, would be that of
        whichever split was scored first.
        """
        rows = as_pairs(test_dataset, self.args.seed)
        rows = self._cache(rows) if self.args.freeze_encoder else rows
        return DataLoader(
            rows, batch_size=self.args.per_device_eval_batch_size, collate_fn=self.data_collator
        )

    @property
    def split_encoder(self) -> SplitEncoder:
        """Encodes whole splits with this trainer's model, collator and batch size."""
        return SplitEncoder(
            self.pico_model,
            self.data_collator,
            batch_size=self.args.per_device_eval_batch_size,
            num_workers=self.args.dataloader_num_workers,
            disable_tqdm=self.args.disable_tqdm,
            multiprocessing_context=self.args.dataloader_multiprocessing_context,
            offload=self.args.eval_accumulation_steps is not None,
            processes=self.processes,
        )

    # ---- files ----------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Adds to a saved adapter what peft does not know: prototypes and configuration."""
        super()._save(output_dir, state_dict)
        if self.args.should_save and self.pico_model is not self.model:
            save_companions(
                self.accelerator.unwrap_model(self.model), output_dir or self.args.output_dir
            )

    def _publish(self, checkpoint: Path) -> None:
        """Adds prototypes, model card and plots of this very moment to the pushed folder first."""
        running = self.push_in_progress is not None and not self.push_in_progress.is_done()
        skipped = running and not self.args.hub_always_push  # an upload is reading the folder
        wanted = self.args.hub_strategy != HubStrategy.END and not skipped
        if self.is_world_process_zero() and wanted:
            copy_model_files(checkpoint, Path(self.args.output_dir))
            self.create_model_card()
            super()._publish(checkpoint)

    def create_model_card(self, model_name: str | None = None, **kwargs: Any) -> None:
        """Writes a model card with numbers and plots; one written by somebody else stays.

        Args:
            model_name: Title.
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

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor | int | None]:
        """Batches of one step, see `Trainer.get_batch_samples`; knows which pairs are repeated."""
        taken = super().get_batch_samples(epoch_iterator, num_batches, device)
        distributed.mark_repeated_pairs(taken[0], self.accelerator.gradient_state, self.processes)
        return taken

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Hands the warm-up's ramp to the model; see `Trainer.compute_loss` for the arguments.

        Each process has the loss of the pairs of all; of a single pair it is 0, without negatives.
        """
        epoch, warmup = self.state.epoch or 0.0, self.args.prototype_warmup_epochs
        ramp = epoch / warmup if epoch < warmup else None
        whole = distributed.whole_batch_inputs(inputs, self.pico_model, self.processes)
        loss_of = partial(loss_of_batch, self.compute_loss_func, num_items_in_batch)
        if self.args.mini_batch_size is None:
            outputs = model(**whole, loss_ramp=ramp)
            loss = loss_of(outputs)
        else:
            later = partial(self.accelerator.no_sync, model)
            cached = CachedGradients(model, self.pico_model, self.args.mini_batch_size, later)
            loss, outputs = cached.loss(whole, loss_of, ramp)
        self.count_parts(outputs)
        return (loss, outputs) if return_outputs else loss

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        """Lets processes train with parameters that no loss reaches."""
        with distributed.looking_for_unused_parameters(self):
            return super()._build_accelerator_args(**kwargs)

    def _update_auto_batch_size(self, batch_size: int) -> None:
        """Stops looking for a batch size where there are no negatives any more."""
        if batch_size < 2:
            raise ValueError(
                "`auto_find_batch_size` came down to one pair, which has no negatives. Take "
                "smaller images or a smaller encoder, or pass `gradient_checkpointing=True`."
            )
        super()._update_auto_batch_size(batch_size)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The chosen optimizer, with a lower learning rate for towers than for heads."""
        if self.optimizer is not None:
            return self.optimizer
        chosen, given = self.model if model is None else model, self.optimizer_cls_and_kwargs
        optimizer, options = given or self.get_optimizer_cls_and_kwargs(self.args, chosen)
        decayed = self.get_decay_parameter_names(chosen)
        options = grouped_options(optimizer, options, chosen, self.args, decayed)
        try:  # stock code makes the optimizer of what it finds here
            self.optimizer_cls_and_kwargs = optimizer, options
            return super().create_optimizer(model)
        finally:
            self.optimizer_cls_and_kwargs = given

    def _cache(self, rows: ImageTextDataset) -> ImageTextDataset:
        folder = Path(self.args.feature_cache_dir or default_cache_dir())
        return cache_token_features(self.split_encoder, rows, folder)
