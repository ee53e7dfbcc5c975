"""Protected MiLoRA in ms-swift, on the language tower; an absolute path, because checkpoints store it:

swift sft --tuner_type milora --external_plugins /PATH/ms_swift_plugin.py --model ... --dataset ...
swift rlhf --rlhf_type dpo --adapters SFT/checkpoint-100 --ref_adapters SFT/checkpoint-100 ...

The rule decides what trains, and not `--target_modules`.
"""

from peft import PeftModel
from swift import PeftTuner, tuners_map

from milora_vl import apply_milora, calibration_texts, load_adapter


class Milora(PeftTuner):
    @staticmethod
    def prepare_model(args, model):
        rule = {"modules": "language", "method": "milora", "rank": args.lora_rank, "alpha": args.lora_alpha}
        return apply_milora(model, [rule], calibration=calibration_texts(model))

    @staticmethod
    def from_pretrained(model, model_id, **options):
        if not isinstance(model, PeftModel):
            return load_adapter(model, model_id, **options)
        model.load_adapter(model_id, **options)  # the reference of `swift rlhf`, beside the adapter that trains
        return model


tuners_map["milora"] = Milora
