"""What the model can draw: the subjects, the ground colours, and the words for both in English and Chinese."""
from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

# Ground colours: name -> (red, green, blue in 0..255, Chinese name). White is the ground of every second picture.
COLOURS = {
    "white": ((255, 255, 255), "白色"), "black": ((22, 22, 26), "黑色"), "gray": ((150, 152, 156), "灰色"),
    "red": ((212, 50, 50), "红色"), "orange": ((244, 150, 52), "橙色"), "yellow": ((250, 214, 72), "黄色"),
    "green": ((72, 170, 92), "绿色"), "teal": ((42, 160, 164), "青色"), "blue": ((62, 110, 214), "蓝色"),
    "navy": ((28, 40, 96), "深蓝色"), "purple": ((136, 82, 190), "紫色"), "pink": ((244, 166, 190), "粉色"),
    "brown": ((126, 86, 56), "棕色"), "cream": ((250, 238, 210), "米色"),
}

# The 48 subjects by which the model is measured: Noto icon, English name, Chinese name.
NAMED = (
    ("dog-face", "dog", "狗"), ("cat-face", "cat", "猫"), ("panda", "panda", "熊猫"), ("frog", "frog", "青蛙"),
    ("owl", "owl", "猫头鹰"), ("penguin", "penguin", "企鹅"), ("elephant", "elephant", "大象"), ("fish", "fish", "鱼"),
    ("octopus", "octopus", "章鱼"), ("butterfly", "butterfly", "蝴蝶"), ("turtle", "turtle", "乌龟"), ("snail", "snail", "蜗牛"),
    ("sunflower", "sunflower", "向日葵"), ("cactus", "cactus", "仙人掌"), ("evergreen-tree", "pine tree", "松树"),
    ("mushroom", "mushroom", "蘑菇"), ("red-apple", "apple", "苹果"), ("strawberry", "strawberry", "草莓"),
    ("banana", "banana", "香蕉"), ("pineapple", "pineapple", "菠萝"), ("watermelon", "watermelon", "西瓜"),
    ("pizza", "pizza", "披萨"), ("hamburger", "hamburger", "汉堡"), ("ice-cream", "ice cream", "冰淇淋"),
    ("automobile", "car", "汽车"), ("airplane", "airplane", "飞机"), ("rocket", "rocket", "火箭"), ("bicycle", "bicycle", "自行车"),
    ("sailboat", "sailboat", "帆船"), ("locomotive", "steam train", "蒸汽火车"), ("helicopter", "helicopter", "直升机"),
    ("house", "house", "房子"), ("umbrella", "umbrella", "雨伞"), ("star", "star", "星星"), ("crescent-moon", "moon", "月亮"),
    ("red-heart", "heart", "红心"), ("guitar", "guitar", "吉他"), ("trumpet", "trumpet", "小号"), ("key", "key", "钥匙"),
    ("hammer", "hammer", "锤子"), ("scissors", "scissors", "剪刀"), ("bell", "bell", "铃铛"), ("light-bulb", "light bulb", "灯泡"),
    ("alarm-clock", "alarm clock", "闹钟"), ("camera", "camera", "相机"), ("crown", "crown", "皇冠"),
    ("soccer-ball", "soccer ball", "足球"), ("ghost", "ghost", "鬼"),
)

# Further plain things that everybody can name; their words are the labels of emojibase.
OTHERS = """
ant baby-chick bat bear bird crab crocodile dolphin duck eagle flamingo fox giraffe hedgehog honeybee horse-face jellyfish
koala lady-beetle lion lobster monkey-face mouse-face parrot pig-face polar-bear rabbit-face rooster scorpion shark snake
spider squid swan t-rex tiger-face unicorn whale wolf zebra hamster gorilla cow-face
cherry-blossom deciduous-tree maple-leaf palm-tree potted-plant rose seedling shamrock tulip hibiscus
avocado bagel birthday-cake bread broccoli candy carrot cheese-wedge cherries chocolate-bar cookie coconut croissant
cucumber cupcake doughnut egg eggplant french-fries garlic grapes green-apple hot-beverage hot-dog hot-pepper kiwi-fruit
lemon lollipop mango melon onion pancakes peach peanuts pear popcorn potato pretzel rice-ball sandwich sushi taco
tangerine teapot tomato waffle wine-glass beer-mug cocktail-glass honey-pot bell-pepper
ambulance anchor bus castle church cloud compass droplet fire fire-engine fuel-pump full-moon luggage motorcycle mountain
police-car racing-car rainbow ringed-planet roller-skate satellite school ship skateboard snowflake snowman sun taxi tent
tractor volcano watch wheel flying-saucer parachute tram hourglass-done
artist-palette balloon baseball basketball boxing-glove bullseye christmas-tree crystal-ball game-die ice-skate kite
puzzle-piece ribbon sports-medal teddy-bear tennis trophy video-game volleyball wrapped-gift yarn
accordion axe backpack basket bed bomb books broom bucket candle chair coin coffin credit-card door dress drum envelope
gear gem-stone glasses gloves graduation-cap headphone jeans ladder laptop lipstick locked magnet megaphone microphone
microscope mirror mobile-phone money-bag musical-keyboard necktie newspaper paintbrush paperclip pencil pill pushpin radio
ring running-shoe saxophone scarf screwdriver scroll shield shopping-cart socks sunglasses syringe t-shirt telephone
television test-tube toilet toothbrush top-hat violin wastebasket window wrench
alien clown-face robot skull speech-balloon broken-heart grinning-face crying-face winking-face sleeping-face
""".split()


@dataclass(frozen=True)
class Subject:
    """One thing that can be drawn. The first name of each language is the one it is measured by."""

    icon: str
    english: tuple[str, ...]
    chinese: tuple[str, ...]
    tags: tuple[str, ...]


def _bare_code(hexcode: str) -> str:
    """A code point sequence as the icon set and the annotations both spell it (no variation selector)."""
    return "-".join(part for part in hexcode.lower().split("-") if part != "fe0f")


def load_annotations(packages: Path, language: str) -> dict[str, dict]:
    rows = json.loads((packages / "emojibase-data" / language / "data.json").read_text("utf-8"))
    return {_bare_code(row["hexcode"]): row for row in rows}


def load_subjects(packages: Path) -> list[Subject]:
    """All subjects, the named ones first, with their words joined from the annotations."""
    english, chinese = load_annotations(packages, "en"), load_annotations(packages, "zh")
    codes = json.loads((packages / "@iconify-json/noto/chars.json").read_text("utf-8"))
    code_of = {name: _bare_code(code) for code, name in codes.items() if _bare_code(code) in english}
    chosen = {icon: (en, zh) for icon, en, zh in NAMED} | {icon: None for icon in OTHERS if icon in code_of}
    subjects = []
    for icon, own_names in chosen.items():
        en, zh = english[code_of[icon]], chinese[code_of[icon]]
        en_names = [en["label"].lower().replace("’", "'"), icon.replace("-", " ")]
        zh_names = [zh["label"]]
        if own_names:
            en_names.insert(0, own_names[0])
            zh_names.insert(0, own_names[1])
        tags = tuple(tag.lower() for tag in en.get("tags", []) + zh.get("tags", []))
        subjects.append(Subject(icon, tuple(dict.fromkeys(en_names)), tuple(dict.fromkeys(zh_names)), tags))
    return subjects


def is_held_out(subject_index: int, colour: str) -> bool:
    """About one combination of subject and ground in six is never trained, so that composing them can be measured."""
    return colour != "white" and (subject_index * 7919 + list(COLOURS).index(colour) * 104729) % 6 == 0


def plain_caption(subject: Subject, colour: str | None, language: str) -> str:
    """The caption by which the model is measured."""
    if language == "zh":
        return f"{COLOURS[colour][1]}背景上的{subject.chinese[0]}" if colour else subject.chinese[0]
    return f"{subject.english[0]} on a {colour} background" if colour else subject.english[0]


def training_caption(subject: Subject, colour: str | None, random) -> str:
    """One of the many ways to say the same: 60 % English, 40 % Chinese, any of the names, several word orders."""
    if random.random() < 0.4:
        name = subject.chinese[0] if random.random() < 0.6 else random.choice(subject.chinese)
        if not colour:
            return str(name)
        ground = f"{COLOURS[colour][1]}背景"
        return f"{ground}上的{name}" if random.random() < 0.6 else f"{name}，{ground}"
    name = subject.english[0] if random.random() < 0.6 else str(random.choice(subject.english))
    form = random.random()
    if form < 0.2:
        name = "a " + name
    elif form < 0.3:
        name = "an icon of " + name
    elif form < 0.36:
        name = name + " icon"
    if not colour:
        return name
    return f"{name} on a {colour} background" if random.random() < 0.7 else f"{name}, {colour} background"
