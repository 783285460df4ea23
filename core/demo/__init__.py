"""The bundled demo: a small world of stories and a LLaMA checkpoint trained on it.

Nothing here imports torch, so that the path and the text are available everywhere:

* `CHECKPOINT`: the folder of the trained checkpoint, an ordinary Hugging Face folder.
* `DATA`: the text files shipped with it.
* `core.demo.world`: stories, and instructions over the same world.
* `core.demo.questions`: multiple-choice questions for several skills.
* `python -m core.demo.train`: the training recipe. `python -m core.demo.evaluate`: its figures.
"""

from pathlib import Path

CHECKPOINT: Path = Path(__file__).parent / "checkpoint"
"""The folder of the bundled checkpoint: config.json, model.safetensors, tokenizer.json."""

DATA: Path = Path(__file__).parent / "data"
"""The folder of the shipped text: held-out stories, instructions and questions."""
