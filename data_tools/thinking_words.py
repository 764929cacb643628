"""The words that prompts name things by, in English and Chinese, as data: colours, numbers, styles, relations, light.

Each table maps one meaning to its spellings, so that "red", "crimson tones" and "红色" can be compared across languages.
English spellings are matched as whole words without regard to case, Chinese ones as substrings, the longest first.
"""

from __future__ import annotations

COLOURS: dict[str, tuple[str, ...]] = {
    "red": ("red", "红色", "红"), "crimson": ("crimson", "绯红", "深红"), "scarlet": ("scarlet", "猩红"),
    "maroon": ("maroon", "栗色"), "orange": ("orange", "橙色", "橘色"), "coral": ("coral", "珊瑚色"), "peach": ("peach-coloured", "桃色"),
    "yellow": ("yellow", "黄色", "黄"), "gold": ("gold", "golden", "金色"), "mustard": ("mustard yellow", "芥末黄"),
    "green": ("green", "绿色", "绿"), "olive": ("olive green", "橄榄绿"), "lime": ("lime green", "黄绿色"), "mint": ("mint green", "薄荷绿"),
    "teal": ("teal", "青色", "蓝绿色"), "turquoise": ("turquoise", "绿松石色"), "cyan": ("cyan", "青蓝色"), "blue": ("blue", "蓝色", "蓝"),
    "navy": ("navy", "navy blue", "深蓝色", "藏青色", "海军蓝"), "azure": ("azure", "天蓝色", "蔚蓝"), "indigo": ("indigo", "靛蓝", "靛色"),
    "purple": ("purple", "紫色", "紫"), "violet": ("violet", "紫罗兰色"), "lavender": ("lavender", "淡紫色"), "magenta": ("magenta", "品红", "洋红"),
    "pink": ("pink", "粉色", "粉红", "粉红色"), "brown": ("brown", "棕色", "褐色", "咖啡色"), "tan": ("tan", "黄褐色"), "beige": ("beige",),
    "cream": ("cream-coloured", "米色", "米白", "奶油色"), "ivory": ("ivory", "象牙白", "象牙色"), "white": ("white", "白色", "白"),
    "black": ("black", "黑色", "黑"), "gray": ("gray", "grey", "灰色", "灰"), "silver": ("silver", "银色"), "bronze": ("bronze", "青铜色", "古铜色"),
}

NUMBERS: dict[int, tuple[str, ...]] = {
    0: ("zero",), 1: ("one", "a single", "一"), 2: ("two", "a pair of", "a couple of", "both", "两", "二", "双"), 3: ("three", "三"),
    4: ("four", "四"), 5: ("five", "五"), 6: ("six", "half a dozen", "六"), 7: ("seven", "七"), 8: ("eight", "八"), 9: ("nine", "九"),
    10: ("ten", "十"), 11: ("eleven", "十一"), 12: ("twelve", "a dozen", "十二"), 13: ("thirteen", "十三"), 14: ("fourteen", "十四"),
    15: ("fifteen", "十五"), 16: ("sixteen", "十六"), 17: ("seventeen", "十七"), 18: ("eighteen", "十八"), 19: ("nineteen", "十九"),
    20: ("twenty", "二十"), 30: ("thirty", "三十"), 50: ("fifty", "五十"), 100: ("hundred", "a hundred", "一百"),
}
# A Chinese numeral counts things only before one of these.
CLASSIFIERS = "只个条张把朵棵颗辆匹头位名座间本支枝瓶杯碗盘块片件双对群串架艘台扇幅盏根束座栋株粒排"

STYLES: dict[str, tuple[str, ...]] = {
    "watercolour": ("watercolor", "watercolour", "水彩"), "oil painting": ("oil painting", "oil paint", "油画"), "ink wash": ("ink wash", "ink painting", "水墨", "国画"),
    "pencil": ("pencil drawing", "pencil sketch", "铅笔画", "素描"), "sketch": ("sketch", "速写", "草图"), "charcoal": ("charcoal drawing", "炭笔画"),
    "pixel art": ("pixel art", "8-bit", "16-bit", "像素画", "像素艺术", "像素风"), "flat": ("flat design", "flat shapes", "flat illustration", "flat style", "扁平"),
    "vector": ("vector art", "vector illustration", "矢量"), "line art": ("line art", "line drawing", "outline style", "线稿", "线描"),
    "anime": ("anime", "动漫", "二次元"), "manga": ("manga", "漫画"), "cartoon": ("cartoon", "卡通"), "comic": ("comic book", "comic style", "美漫"),
    "3d render": ("3d render", "3d rendering", "cgi", "三维渲染", "3D渲染"), "low poly": ("low poly", "low-poly", "低多边形"), "isometric": ("isometric", "等距", "等轴测"),
    "photograph": ("photo", "photograph", "photorealistic", "photography", "照片", "摄影", "写实"), "cinematic": ("cinematic", "film still", "电影感", "电影风格"),
    "impressionist": ("impressionist", "impressionism", "印象派"), "cubist": ("cubist", "cubism", "立体主义"), "surreal": ("surreal", "surrealist", "超现实"),
    "minimalist": ("minimalist", "minimal", "minimalism", "极简", "简约"), "art deco": ("art deco", "装饰艺术"), "art nouveau": ("art nouveau", "新艺术"),
    "ukiyo-e": ("ukiyo-e", "浮世绘"), "woodcut": ("woodcut", "linocut", "木刻", "版画"), "pop art": ("pop art", "波普"), "baroque": ("baroque", "巴洛克"),
    "gothic": ("gothic", "哥特"), "cyberpunk": ("cyberpunk", "赛博朋克"), "steampunk": ("steampunk", "蒸汽朋克"), "vintage": ("vintage", "retro", "复古"),
    "paper cut": ("paper cut", "papercut", "paper cutout", "剪纸"), "origami": ("origami", "折纸"), "clay": ("claymation", "clay model", "黏土"),
    "stained glass": ("stained glass", "彩色玻璃"), "mosaic": ("mosaic", "马赛克"), "graffiti": ("graffiti", "涂鸦"), "embroidery": ("embroidery", "刺绣"),
    "blue and white porcelain": ("blue and white porcelain", "青花瓷"), "duotone": ("duotone", "two-tone", "双色调"), "monochrome": ("monochrome", "black and white", "单色", "黑白"),
    "pastel": ("pastel", "粉彩", "柔和色调"), "neon": ("neon", "霓虹"), "realistic": ("realistic", "逼真", "真实感"), "abstract": ("abstract", "抽象"),
    "illustration": ("illustration", "插画", "插图"), "poster": ("poster", "海报"), "icon": ("icon", "图标"), "logo": ("logo", "标志", "徽标"), "sticker": ("sticker", "贴纸"),
    "fantasy": ("fantasy art", "奇幻"), "blueprint": ("blueprint", "蓝图"), "chalk": ("chalk drawing", "粉笔画"), "gouache": ("gouache", "水粉"),
}

# relation of thinking_schema.RELATIONS -> English phrases; longest first where one holds another.
RELATIONS_EN: dict[str, tuple[str, ...]] = {
    "left_of": ("to the left of", "on the left of", "on the left side of", "left of"),
    "right_of": ("to the right of", "on the right of", "on the right side of", "right of"),
    "in_front_of": ("in front of",), "on": ("sitting on", "standing on", "lying on", "on top of", "resting on", "on"),
    "next_to": ("next to", "beside", "near", "by the side of", "alongside"), "under": ("underneath", "beneath", "under"),
    "below": ("below",), "above": ("above", "over"), "behind": ("behind",), "inside": ("inside of", "inside", "in the middle of", "within"),
    "around": ("surrounded by", "around"), "between": ("between",), "holding": ("holding", "carrying"), "wearing": ("wearing", "dressed in"),
    "looking_at": ("looking at", "facing", "watching"), "part_of": ("part of",), "with": ("with",),
}
# How the second element of "surrounded by" stands to the first is the other way round.
TURNED_EN = ("surrounded by",)
# After "A在B" (a at b) and a possible 的: where.
PLACES_ZH: dict[str, tuple[str, ...]] = {
    "left_of": ("左边", "左侧", "左面", "左方"), "right_of": ("右边", "右侧", "右面", "右方"), "in_front_of": ("前面", "前方", "前边", "面前"),
    "behind": ("后面", "背后", "后方", "后边"), "above": ("上方",), "on": ("上面", "上边", "之上", "上"), "below": ("下方",),
    "under": ("下面", "底下", "之下", "下边", "下"), "next_to": ("旁边", "旁", "身边", "附近"), "inside": ("里面", "里", "中间", "内", "之中", "当中"),
    "around": ("周围", "四周"),
}
VERBS_ZH: dict[str, tuple[str, ...]] = {
    "holding": ("拿着", "抱着", "举着", "握着", "捧着"), "wearing": ("穿着", "戴着", "身穿", "头戴"), "looking_at": ("看着", "望着", "面对"), "with": ("带着", "有着"),
}

RELATION_WORDS: dict[str, tuple[str, str]] = {
    "on": ("on", "在{b}上面"), "under": ("under", "在{b}下面"), "above": ("above", "在{b}上方"), "below": ("below", "在{b}下方"),
    "left_of": ("to the left of", "在{b}左边"), "right_of": ("to the right of", "在{b}右边"), "in_front_of": ("in front of", "在{b}前面"),
    "behind": ("behind", "在{b}后面"), "inside": ("inside", "在{b}里面"), "around": ("around", "在{b}周围"), "between": ("between", "在{b}之间"),
    "holding": ("holding", "拿着{b}"), "wearing": ("wearing", "穿戴着{b}"), "next_to": ("next to", "在{b}旁边"),
    "looking_at": ("looking at", "看着{b}"), "part_of": ("part of", "是{b}的一部分"), "with": ("with", "带着{b}"),
}

LIGHTING: tuple[str, ...] = (
    "golden hour", "soft light", "soft lighting", "hard light", "backlit", "back light", "rim light", "studio lighting", "studio light", "candlelight",
    "moonlight", "sunlight", "natural light", "volumetric light", "volumetric lighting", "dramatic lighting", "low key", "high key", "neon lights", "dim light",
    "bright light", "low sun", "overcast", "at sunset", "at sunrise", "at dusk", "at dawn", "at night", "at noon",
    "黄金时刻", "柔光", "逆光", "侧光", "烛光", "月光", "阳光", "自然光", "日落", "日出", "黄昏", "黎明", "夜晚", "夜景", "正午", "霓虹灯光", "工作室灯光",
)
COMPOSITION: tuple[str, ...] = (
    "close-up", "close up", "macro shot", "wide shot", "wide angle", "medium shot", "full body", "portrait", "bird's eye view", "top view", "top-down view",
    "aerial view", "from above", "from below", "low angle", "high angle", "eye level", "side view", "front view", "centered", "centred", "symmetrical",
    "rule of thirds", "panorama", "in the centre", "in the center", "in the foreground", "in the background",
    "特写", "全身", "半身", "俯视", "仰视", "鸟瞰", "广角", "侧面", "正面", "居中", "对称", "全景", "近景", "远景", "中景",
)
PLACES_EN: tuple[str, ...] = (
    "background", "park", "forest", "beach", "city", "street", "room", "kitchen", "garden", "field", "desert", "mountains", "sky", "space", "sea", "ocean",
    "lake", "river", "snow", "rain", "office", "studio", "library", "cafe", "market", "village", "meadow", "jungle", "cave", "bedroom", "landscape", "countryside",
)
PLACES_ZH_WORDS: tuple[str, ...] = (
    "背景", "公园", "森林", "海滩", "沙滩", "城市", "街道", "街上", "房间", "厨房", "花园", "田野", "沙漠", "山中", "天空", "太空", "海上", "海边", "湖边", "河边",
    "雪地", "雨中", "办公室", "工作室", "图书馆", "咖啡馆", "市场", "村庄", "草地", "丛林", "洞穴", "卧室",
)
ADJECTIVES_EN: tuple[str, ...] = tuple("""
big small large tiny huge little giant tall short long round square flat thin thick wide narrow old young new ancient modern wooden metal glass stone
plastic paper leather golden shiny dark light bright pale deep soft hard fluffy furry smooth rough striped spotted dotted plain colorful colourful happy sad
angry smiling sleeping sitting standing running flying jumping swimming walking lying dancing laughing open closed empty full broken beautiful cute pretty
ripe fresh wet dry hot cold warm transparent rusty elegant simple ornate wild friendly
""".split())
ADJECTIVES_ZH: tuple[str, ...] = ("大", "小", "老", "旧", "新", "高", "矮", "胖", "瘦", "可爱", "美丽", "漂亮", "木", "木制", "金属", "玻璃", "毛茸茸", "巨大", "圆", "方")
