// Every word on the page, in English and Chinese. Functions take the numbers that belong into the sentence.
export const TEXTS = {
  en: {
    other: "中文", left: "left", right: "right", tie: "equally good", bad: "both bad", allBad: "all bad", skip: "skip", undo: "undo", flicker: "compare in place",
    zoom: "larger", help: "keys", close: "close", best: "best first", equal: "equal to the last", takeBack: "take back", confirm: "done", move: "move",
    of: (done, total) => `${done} of ${total}`, left_time: (minutes) => minutes < 1 ? "under a minute left" : `about ${minutes} min left`,
    undone: "Taken back", nothingToUndo: "Nothing to take back", skipped: "Skipped", rankAll: "Give every picture a place first",
    unsaved: (count) => `${count === 1 ? "One answer is" : `${count} answers are`} not saved yet. Trying again… Keep this page open; if the program ended, start it again.`,
    refused: "The program refused this page", loading: "Loading…", picture: (n) => `Picture ${n}`,
    doneTitle: "That was all.", doneText: "Every answer is saved. Thank you.",
    figures: { judgements: "answers", seconds: "seconds an answer", left: "chose the left one", consistency: "same answer when asked again", agreement: "agreement of annotators" },
    revisit: (count) => count === 1 ? "see the skipped one again" : `see the ${count} skipped again`, finish: "finish and close",
    finished: "Finished. You can close this tab.",
    titles: { pair: "Which picture do you prefer?", rank: "Put the pictures in order, best first.", score: "Give points from 1 to 5." },
    helpNote: "Every answer is written to disk at once. Close the page whenever you like; next time you go on where you stopped.",
    criteria: {
      alignment: ["Alignment", "Shows what the words say"], aesthetics: ["Aesthetics", "Pleasing light, colour, composition"],
      realism: ["Realism", "Believable, free of faults"], style: ["Style fidelity", "Looks like the style that was wanted"],
    },
  },
  zh: {
    other: "English", left: "左", right: "右", tie: "一样好", bad: "都不好", allBad: "全都不好", skip: "跳过", undo: "撤销", flicker: "原位对比",
    zoom: "放大", help: "按键", close: "关闭", best: "从最好开始", equal: "与上一张并列", takeBack: "收回", confirm: "完成", move: "移动",
    of: (done, total) => `${done} / ${total}`, left_time: (minutes) => minutes < 1 ? "不到一分钟" : `还需约 ${minutes} 分钟`,
    undone: "已撤销", nothingToUndo: "没有可以撤销的", skipped: "已跳过", rankAll: "请先为每张图片排好名次",
    unsaved: (count) => `有 ${count} 个回答尚未保存，正在重试……请不要关闭页面；如果程序已经结束，请重新启动。`,
    refused: "程序拒绝了这个页面", loading: "正在加载……", picture: (n) => `图片 ${n}`,
    doneTitle: "全部完成", doneText: "所有回答都已保存，谢谢。",
    figures: { judgements: "个回答", seconds: "秒（每个回答）", left: "选择左图", consistency: "再次询问时一致", agreement: "标注者之间一致" },
    revisit: (count) => `再看 ${count} 个跳过的`, finish: "结束并关闭",
    finished: "已结束，可以关闭此标签页。",
    titles: { pair: "你更喜欢哪一张？", rank: "请从最好到最差排序。", score: "请打 1 到 5 分。" },
    helpNote: "每个回答都会立即写入磁盘。随时可以关闭页面，下次会从这里继续。",
    criteria: {
      alignment: ["文图一致", "画面符合文字"], aesthetics: ["美感", "光线、色彩、构图悦目"],
      realism: ["真实感", "可信，没有瑕疵"], style: ["风格还原", "符合想要的风格"],
    },
  },
};

export function preferredLanguage() {
  const stored = localStorage.getItem("brushwork.language");
  if (stored in TEXTS) return stored;
  return navigator.language.toLowerCase().startsWith("zh") ? "zh" : "en";
}
