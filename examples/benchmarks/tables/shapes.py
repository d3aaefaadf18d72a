"""A tiny LLaVA that answers questions about pictures of shapes: the pictures, the questions, and its training.

Both towers are trained before they meet, as LLaVA's are: the language tower is the embedded model, and the vision
tower learns here to name colours and shapes. Then all of it learns from questions, and from text beside them, so that
it stays a language model.
"""

import json
import random
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from optimum_dsa import demo_texts, load_tokens


COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 80, 230), "yellow": (235, 215, 50)}
SHAPES = ("circle", "square", "triangle")
SIZE, PATCH = 32, 8  # pixels
IMAGE = "<image>"
CHAT = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}\n{% endif %}"
    "{% endfor %}{% endfor %}"
)
IGNORED = -100  # as a label
TRAINING = "training.json"
TEXT = (2, 64)  # windows and tokens of text in a step


def draw(colour: str, shape: str, chance: random.Random) -> Image.Image:
    """A picture of one shape, somewhere on a dull background, (SIZE, SIZE)."""
    picture = Image.new("RGB", (SIZE, SIZE), tuple(chance.randrange(90, 140) for _ in range(3)))
    side = chance.randrange(18, 26)
    left, top = (chance.randrange(1, SIZE - side - 1) for _ in range(2))
    box = (left, top, left + side, top + side)
    pen = ImageDraw.Draw(picture)
    if shape == "triangle":
        pen.polygon([(left, box[3]), (box[2], box[3]), (left + side // 2, top)], fill=COLOURS[colour])
    else:
        (pen.ellipse if shape == "circle" else pen.rectangle)(box, fill=COLOURS[colour])
    return picture


def questions(count: int, seed: int) -> list[dict[str, Any]]:
    """Rows of picture, question and answer; what colour, what shape, and whether something is there, in turn."""
    chance, rows = random.Random(seed), []
    for number in range(count):
        colour, shape = chance.choice(list(COLOURS)), chance.choice(SHAPES)
        asked, answer = "what colour is it?", colour
        if number % 3 == 1:
            asked, answer = "what shape is it?", shape
        elif number % 3 == 2:
            answer = chance.choice(["yes", "no"])
            others = [(c, s) for c in COLOURS for s in SHAPES if (c == colour) != (s == shape)]  # half right
            meant = (colour, shape) if answer == "yes" else chance.choice(others)
            asked = f"is there a {' '.join(meant)}?"
        rows.append({"picture": draw(colour, shape, chance), "question": asked, "answers": [answer]})
    return rows


def new_model(language: str | Path) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """A LLaVA around this language model, whose vision tower and projector know nothing yet, and its processor."""
    tokenizer = AutoTokenizer.from_pretrained(language)
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE], "pad_token": tokenizer.eos_token})
    tower = AutoModelForCausalLM.from_pretrained(language, dtype=torch.float32)
    tower.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    eyes = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=PATCH,
        projection_dim=64,
    )
    tied = tower.config.tie_word_embeddings
    number = tokenizer.convert_tokens_to_ids(IMAGE)
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=eyes, text_config=tower.config, image_token_id=number, tie_word_embeddings=tied)
    )
    model.model.language_model.load_state_dict(tower.model.state_dict())
    model.lm_head.load_state_dict(tower.lm_head.state_dict())
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = tokenizer.eos_token_id
    pixels = {"size": {"shortest_edge": SIZE}, "crop_size": {"height": SIZE, "width": SIZE}}
    processor = LlavaProcessor(
        CLIPImageProcessor(**pixels), tokenizer, PATCH, "default", CHAT, IMAGE, num_additional_image_tokens=1
    )
    return model, processor


def asked(processor: Any, rows: list[dict[str, Any]], answered: bool = False) -> dict[str, torch.Tensor]:
    """Inputs of a batch of rows, padded on the left, each up to where its answer begins, or with it, and labels."""
    tokenizer = processor.tokenizer
    tokenizer.padding_side = "left"  # an answer begins where its row ends
    texts = [prompt(processor, row["question"]) for row in rows]
    if not answered:
        return dict(processor(images=[r["picture"] for r in rows], text=texts, padding=True, return_tensors="pt"))
    ends = [row["answers"][0] + tokenizer.eos_token for row in rows]
    whole = [text + end for text, end in zip(texts, ends)]
    found = dict(processor(images=[r["picture"] for r in rows], text=whole, padding=True, return_tensors="pt"))
    labels = torch.full_like(found["input_ids"], IGNORED)
    for number, end in enumerate(ends):
        length = len(tokenizer(end, add_special_tokens=False)["input_ids"])
        labels[number, -length:] = found["input_ids"][number, -length:]
    return {**found, "labels": labels}


def prompt(processor: Any, question: str) -> str:
    """A question about a picture in the words that the model was trained on."""
    if not getattr(processor, "chat_template", None):
        return f"{processor.image_token}\n{question}"
    said = [{"type": "image"}, {"type": "text", "text": question}]
    return processor.apply_chat_template([{"role": "user", "content": said}], add_generation_prompt=True)


def train_tower(model: LlavaForConditionalGeneration, processor: Any, steps: int, batch: int = 128) -> None:
    """Have the vision tower name colour and shape by the mean of what the projector reads of it."""
    tower, layer = model.model.vision_tower.train(), model.config.vision_feature_layer
    names = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    head = torch.nn.Linear(tower.config.hidden_size, len(names))
    optimizer = torch.optim.AdamW([*tower.parameters(), *head.parameters()])
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps + 1)
    for step in range(1, steps + 1):
        chance = random.Random(-step)
        labels = [chance.randrange(len(names)) for _ in range(batch)]
        pictures = [draw(*names[label], chance) for label in labels]
        pixels = processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
        patches = tower(pixels, output_hidden_states=True).hidden_states[layer][:, 1:]
        loss = torch.nn.functional.cross_entropy(head(patches.mean(1)), torch.tensor(labels))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        if step % 100 == 0 or step == steps:
            print(f"vision tower: step {step} of {steps}, loss {loss:.3f}", flush=True)


def train(folder: Path, language: str | Path, steps: int, batch: int = 32, rate: float = 1e-3, seed: int = 0) -> None:
    """Train the vision tower, then the model on questions, all made as it goes; save it with its processor."""
    torch.manual_seed(seed)
    model, processor = new_model(language)
    count, length = TEXT
    text = load_tokens(demo_texts("calibration"), processor.tokenizer, sequence_length=length)
    began = time.monotonic()
    train_tower(model, processor, steps)
    new = list(model.model.multi_modal_projector.parameters())
    known = {id(one) for one in new}
    old = [one for one in model.parameters() if id(one) not in known]  # what is trained already, is to change less
    optimizer = torch.optim.AdamW([{"params": new, "lr": rate}, {"params": old, "lr": rate / 2}], betas=(0.9, 0.95))
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, [rate, rate / 2], total_steps=steps + 1)
    model.train()
    for step in range(1, steps + 1):
        inputs = asked(processor, questions(batch, seed=seed + step), answered=True)
        windows = text[torch.randint(len(text), (count,))]
        loss, read = model(**inputs).loss, model(input_ids=windows, labels=windows).loss
        (loss + read / 4).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        if step % 25 == 0 or step == steps:
            seconds = time.monotonic() - began
            print(
                f"step {step} of {steps}: loss of answers {loss:.3f}, of text {read:.3f}, {seconds:.0f} s", flush=True
            )
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    made = {"steps": steps, "batch": batch, "rate": rate, "seed": seed, "seconds": round(time.monotonic() - began)}
    (folder / TRAINING).write_text(json.dumps(made))
