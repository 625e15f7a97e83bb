import os
from dataclasses import dataclass


@dataclass
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str

    def __post_init__(self) -> None:
        assert os.path.exists(os.path.join(self.lora_path, "adapter_config.json"))
