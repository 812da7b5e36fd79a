"""How facts are worded: statements, questions, answers and exam stems for each relation, for training and held out.

{e} stands for the entity, {v} for its values joined by "、". Wordings under `held_out_` are for evaluation alone and
never reach training data (suwen/synthesis.py checks it). Relations without wordings of their own, and values that are
whole sentences, take generic ones with {n}, the relation's name.

Why so many: a fact met in one wording can be recited but not retrieved; several wordings in shuffled order repair that
("Physics of Language Models: Part 3.1", Allen-Zhu and Li 2023, arXiv:2309.14316).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache


@dataclass(frozen=True)
class Phrasings:
    statements: tuple[str, ...]
    held_out_statements: tuple[str, ...]  # {v} comes last, so that it can be scored as a continuation
    questions: tuple[str, ...]
    held_out_questions: tuple[str, ...]
    answers: tuple[str, ...]
    follow_ups: tuple[str, ...]  # later turns, where the entity is known
    reverse_questions: tuple[str, ...] = ()  # from one value to the entities
    held_out_reverse_questions: tuple[str, ...] = ()
    reverse_answers: tuple[str, ...] = ("{e}。", "是{e}。", "资料中有{e}。")
    exam_stems: tuple[str, ...] = ()
    held_out_exam_stems: tuple[str, ...] = field(default=())


@dataclass(frozen=True)
class Relation:
    head: str  # 疾病 or 药品
    tail: str  # type of the value
    name: str
    terms: bool = False  # a cell of a table is a list of terms, not one text
    clauses: bool = False  # values may be clauses ("每日1次，餐后服用"), which its wordings allow for
    complete: bool = False  # a source that names some of the values names all: any other one is wrong
    single: bool = False  # one value each, in so many words that two of them seldom exclude each other


RELATIONS = {  # by their key in our files
    "definition": Relation("疾病", "描述", "概述"),
    "department": Relation("疾病", "科室", "就诊科室", terms=True, complete=True),
    "symptom": Relation("疾病", "症状", "症状", terms=True),
    "cause": Relation("疾病", "病因", "病因"),
    "examination": Relation("疾病", "检查", "检查项目", terms=True),
    "treatment": Relation("疾病", "治疗", "治疗方法", terms=True),
    "surgery": Relation("疾病", "手术", "手术方式", terms=True),
    "drug": Relation("疾病", "药品", "常用药物", terms=True),
    "complication": Relation("疾病", "疾病", "并发症", terms=True),
    "prevention": Relation("疾病", "描述", "预防措施"),
    "food": Relation("疾病", "食物", "适宜饮食", terms=True),
    "food_to_avoid": Relation("疾病", "食物", "饮食禁忌", terms=True),
    "population": Relation("疾病", "人群", "易感人群", single=True),
    "transmission": Relation("疾病", "描述", "传染性", single=True),
    "prognosis": Relation("疾病", "描述", "治愈情况", single=True),
    "course": Relation("疾病", "描述", "治疗周期", single=True),
    "site": Relation("疾病", "部位", "发病部位", terms=True),
    "drug_class": Relation("药品", "药物类别", "药物类别", terms=True, complete=True),
    "indication": Relation("药品", "疾病", "适应证"),
    "contraindication": Relation("药品", "禁忌", "禁忌证"),
    "adverse_reaction": Relation("药品", "不良反应", "不良反应"),
    "usage": Relation("药品", "用法", "用法用量", clauses=True),
    "population_warning": Relation("药品", "人群警示", "特殊人群用药", clauses=True),
    "precaution": Relation("药品", "描述", "注意事项"),
    "interaction": Relation("药品", "描述", "药物相互作用"),
}

GENERIC = Phrasings(
    statements=(
        "{e}的{n}是{v}。",
        "{e}的{n}一项记载为{v}。",
        "说到{e}的{n}，可以归纳为{v}。",
        "{e}在{n}方面的要点是{v}。",
        "资料中{e}的{n}一栏写的是{v}。",
        "就{n}而言，{e}对应的是{v}。",
        "{e}，{n}：{v}。",
        "了解{e}时要知道它的{n}：{v}。",
        "{v}，这是{e}的{n}。",
    ),
    held_out_statements=("查阅有关{e}的{n}的条目，可以看到{v}。", "翻到{n}这一项，{e}后面写的是{v}。"),
    questions=(
        "{e}的{n}有哪些？",
        "请介绍{e}的{n}。",
        "我想了解{e}的{n}。",
        "{e}的{n}是什么？",
        "关于{e}，它的{n}是怎样的？",
        "请问{e}的{n}包括什么？",
        "说说{e}的{n}。",
    ),
    held_out_questions=(
        "能不能告诉我{e}的{n}？",
        "{e}在{n}这方面情况如何？",
        "麻烦查一下{e}的{n}。",
        "医生，{e}的{n}该怎么说？",
    ),
    answers=("{e}的{n}是{v}。", "{e}的{n}：{v}。", "{n}方面，{e}的情况是{v}。", "资料中{e}的{n}写的是{v}。"),
    follow_ups=("它的{n}呢？", "那{n}是什么？", "{n}方面是怎样的？"),
    exam_stems=("下列属于{e}{n}的是", "关于{e}的{n}，正确的是", "{e}的{n}是"),
    held_out_exam_stems=("在{n}方面，与{e}相符的是",),
)

PROSE = Phrasings(
    statements=(
        "{e}的{n}：{v}",
        "关于{e}的{n}，资料这样写：{v}",
        "{e}的{n}如下。{v}",
        "谈到{e}的{n}，要点是：{v}",
        "【{e}】{n}：{v}",
        "说到{n}，{e}是这样的：{v}",
        "下面介绍{e}的{n}。{v}",
        "要了解{e}的{n}，请看这一段。{v}",
        "{e}（{n}）：{v}",
    ),
    held_out_statements=("{e}条目下的{n}部分写道：{v}",),
    questions=GENERIC.questions,
    held_out_questions=GENERIC.held_out_questions,
    answers=("{v}",),
    follow_ups=GENERIC.follow_ups,
)

PHRASINGS = {
    "department": Phrasings(
        statements=(
            "{e}患者应到{v}就诊。",
            "得了{e}，一般挂{v}的号。",
            "{e}属于{v}的诊治范围。",
            "{v}的医生负责诊治{e}。",
            "怀疑自己患有{e}时，可以去{v}看一看。",
            "医院里接诊{e}的科室是{v}。",
            "{e}的就诊科室：{v}。",
            "看{e}要找{v}。",
            "如果确诊{e}，后续治疗和复查都在{v}。",
            "在{v}的门诊，常能见到{e}的患者。",
        ),
        held_out_statements=("分诊台会把{e}的患者引导到{v}。", "对{e}的患者来说，首选科室是{v}。"),
        questions=(
            "{e}应该挂什么科？",
            "得了{e}去哪个科室看？",
            "请问{e}患者要到什么科就诊？",
            "{e}属于哪个科室？",
            "{e}的就诊科室是什么？",
            "看{e}要找哪个科的医生？",
            "我可能得了{e}，该看哪个科？",
            "{e}归哪个科管？",
            "{e}去医院挂哪一科？",
            "{e}的患者该去哪个门诊？",
            "查出{e}以后找哪个科诊治？",
            "预约看{e}，选什么科室？",
            "孩子得了{e}，要带去哪个科？",
            "{e}由医院的哪个科室负责？",
        ),
        held_out_questions=(
            "家人查出{e}，要去医院的什么科室？",
            "诊治{e}的是哪个科？",
            "{e}患者挂号时应选哪一科？",
            "想看{e}，预约哪个门诊合适？",
        ),
        answers=("{e}患者应到{v}就诊。", "一般挂{v}的号。", "{e}属于{v}的诊治范围，请到{v}就诊。", "建议到{v}就诊。"),
        follow_ups=("应该挂什么科？", "那要看哪个科？", "去哪个科室就诊？"),
        exam_stems=("{e}患者首先应到哪个科室就诊", "诊治{e}的科室是", "{e}属于下列哪个科室的诊治范围"),
        held_out_exam_stems=("某患者确诊{e}，应转往的科室是",),
    ),
    "symptom": Phrasings(
        statements=(
            "{e}的典型症状是{v}。",
            "{e}患者常出现{v}。",
            "{v}是{e}的常见表现。",
            "患上{e}以后，会有{v}。",
            "{e}发作时，主要表现为{v}。",
            "出现{v}时，要想到{e}的可能。",
            "{e}的临床表现：{v}。",
            "医生问诊{e}时，会留意有没有{v}。",
            "多数{e}患者因为{v}来看病。",
            "{e}会让人感到不适，常见的有{v}。",
        ),
        held_out_statements=("{e}最容易被察觉的不适是{v}。", "翻开{e}的病历，主诉一栏多写着{v}。"),
        questions=(
            "{e}的典型症状是什么？",
            "{e}的临床表现有哪些？",
            "得了{e}会有什么症状？",
            "{e}患者常有哪些不舒服？",
            "{e}有什么表现？",
            "请介绍一下{e}的症状。",
            "{e}发作时是什么样的？",
            "怎么从症状上看出是{e}？",
            "{e}会引起哪些不适？",
            "{e}患者身上会有什么异常？",
            "{e}最主要的症状是什么？",
            "出现什么信号要当心{e}？",
            "患{e}的人会感到哪里不适？",
            "{e}一般表现为什么？",
        ),
        held_out_questions=(
            "患了{e}，身体会出现什么异常？",
            "{e}通常会带来哪种不适？",
            "哪些信号提示可能是{e}？",
            "患{e}的人，最主要的表现是？",
        ),
        answers=(
            "{e}的典型症状是{v}。",
            "{e}患者常出现{v}。",
            "主要表现为{v}。",
            "{e}常见的表现有{v}，出现后应及时就医。",
        ),
        follow_ups=("会有什么症状？", "主要有哪些表现？", "发作时会怎样？"),
        reverse_questions=(
            "出现{v}，可能是什么病？",
            "{v}是哪种疾病的症状？",
            "哪些疾病会引起{v}？",
            "{v}要考虑什么病？",
            "我有{v}的情况，会是什么病？",
            "{v}常见于哪些疾病？",
        ),
        held_out_reverse_questions=("{v}提示什么疾病？", "以{v}为表现的病有哪些？"),
        reverse_answers=("{e}。", "可能是{e}，应及时就医确诊。", "常见于{e}。"),
        exam_stems=("{e}的典型症状是", "下列属于{e}临床表现的是", "{e}患者最常出现的是"),
        held_out_exam_stems=("下列症状中，与{e}相符的是",),
    ),
    "cause": Phrasings(
        statements=(
            "{e}的病因是{v}。",
            "{e}多与{v}有关。",
            "{v}会引起{e}。",
            "导致{e}的原因有{v}。",
            "为什么会得{e}？原因包括{v}。",
            "{e}的发病原因：{v}。",
            "{v}是{e}的病因或危险因素。",
            "医学上认为{e}由{v}等因素引起。",
            "与{e}发病有关的因素：{v}。",
        ),
        held_out_statements=("追查{e}的来由，常常归结到{v}。", "{e}背后的成因是{v}。"),
        questions=(
            "{e}的病因是什么？",
            "为什么会得{e}？",
            "{e}是怎么引起的？",
            "哪些原因会导致{e}？",
            "{e}和什么有关？",
            "请说说{e}的发病原因。",
            "{e}有哪些危险因素？",
        ),
        held_out_questions=("什么情况下容易患{e}？", "{e}是由什么造成的？", "引发{e}的因素有哪些？", "{e}从何而来？"),
        answers=("{e}的病因是{v}。", "{e}多与{v}有关。", "常见的病因和危险因素有{v}。", "引起{e}的原因包括{v}。"),
        follow_ups=("为什么会得这个病？", "是什么原因引起的？", "和什么因素有关？"),
        exam_stems=("{e}的病因是", "下列因素中，可引起{e}的是", "与{e}发病有关的是"),
        held_out_exam_stems=("{e}的发病多归因于",),
    ),
    "examination": Phrasings(
        statements=(
            "诊断{e}要做{v}。",
            "{e}患者需要做的检查是{v}。",
            "{v}可以帮助确诊{e}。",
            "怀疑{e}时，医生会安排{v}。",
            "{e}的检查项目：{v}。",
            "确诊{e}要靠{v}。",
            "{v}是诊断{e}的常用检查。",
            "要查清是不是{e}，可以做{v}。",
            "{e}的诊断依据来自{v}。",
            "就诊时，{e}患者往往先做{v}。",
        ),
        held_out_statements=("为了判断是否患有{e}，检查单上开的是{v}。", "判断{e}时，医生参考的检查是{v}。"),
        questions=(
            "{e}需要做哪些检查？",
            "怎样确诊{e}？",
            "诊断{e}要做什么检查？",
            "{e}的检查项目有哪些？",
            "怀疑{e}应该查什么？",
            "{e}患者一般做什么检查？",
            "查{e}用什么方法？",
            "排除{e}要靠哪种检查？",
            "为了确诊{e}要完善哪些检查？",
            "什么检查能查出{e}？",
            "判断是否得了{e}，要做什么检查？",
            "医生怎样检查{e}？",
            "明确诊断{e}需要哪项检查？",
        ),
        held_out_questions=(
            "医生靠什么检查判断是不是{e}？",
            "想排除{e}，得做什么检查？",
            "用哪种检查能发现{e}？",
            "为明确{e}，应完善什么检查？",
        ),
        answers=("诊断{e}要做{v}。", "需要做的检查有{v}。", "{e}患者一般要做{v}，由医生按病情选择。", "可以做{v}。"),
        follow_ups=("需要做哪些检查？", "怎么确诊？", "要查什么？"),
        reverse_questions=(
            "{v}可以用来检查什么病？",
            "哪些疾病需要做{v}？",
            "医生让我做{v}，是怀疑什么病？",
            "做{v}能查出哪些病？",
            "{v}用于诊断哪些疾病？",
            "为什么要做{v}？是查什么病？",
        ),
        held_out_reverse_questions=("什么病会用到{v}？", "开{v}这项检查，是为了诊断哪些病？"),
        exam_stems=("诊断{e}常用的检查是", "为确诊{e}，应做的检查是", "下列检查中，用于{e}诊断的是"),
        held_out_exam_stems=("对疑似{e}的患者，宜选择的检查是",),
    ),
    "treatment": Phrasings(
        statements=(
            "{e}的治疗方法有{v}。",
            "治疗{e}主要靠{v}。",
            "{v}是治疗{e}的常用方法。",
            "{e}患者可以采用{v}。",
            "对于{e}，医生会考虑{v}。",
            "{e}的治疗：{v}。",
            "临床上用{v}来治疗{e}。",
            "得了{e}，可以通过{v}来改善。",
            "{e}的处理原则包括{v}。",
        ),
        held_out_statements=("面对{e}，治疗方案通常是{v}。", "要控制{e}，可行的办法是{v}。"),
        questions=(
            "{e}怎么治疗？",
            "{e}的治疗方法有哪些？",
            "得了{e}该怎么办？",
            "治疗{e}用什么办法？",
            "{e}应该如何处理？",
            "请介绍{e}的治疗。",
            "{e}有什么好的疗法？",
        ),
        held_out_questions=(
            "{e}能用什么方式来治？",
            "确诊{e}以后，医生会怎么处理？",
            "对付{e}有哪些手段？",
            "{e}的治疗思路是什么？",
        ),
        answers=("{e}的治疗方法有{v}。", "治疗{e}主要靠{v}。", "可以采用{v}，具体方案由医生决定。", "一般采用{v}。"),
        follow_ups=("该怎么治疗？", "有哪些治疗方法？", "应该怎么处理？"),
        exam_stems=("{e}的治疗方法是", "下列措施中，可用于治疗{e}的是", "{e}的处理应包括"),
        held_out_exam_stems=("{e}确诊后，恰当的治疗是",),
    ),
    "drug": Phrasings(
        statements=(
            "治疗{e}的常用药物是{v}。",
            "{v}可以用来治疗{e}。",
            "{e}患者常用的药有{v}。",
            "医生治疗{e}时会开{v}。",
            "{e}的常用药：{v}。",
            "对于{e}，可以选用{v}。",
            "{v}是{e}的治疗药物。",
            "药房里治疗{e}的药有{v}。",
            "{e}用药方面，常用的是{v}。",
            "使用{v}能够控制{e}。",
        ),
        held_out_statements=("医生给{e}患者的处方上写着{v}。", "适合{e}患者使用的药是{v}。"),
        questions=(
            "哪些药物能治疗{e}？",
            "{e}吃什么药？",
            "治疗{e}用什么药？",
            "{e}的常用药有哪些？",
            "得了{e}可以用什么药？",
            "请列举治疗{e}的药物。",
            "{e}患者一般用什么药？",
            "医生给{e}开的是什么药？",
            "哪种药对{e}管用？",
            "{e}靠哪种药控制？",
            "得了{e}，该服哪种药？",
            "有没有治{e}的药，叫什么？",
            "{e}的治疗药物是哪一种？",
        ),
        held_out_questions=(
            "对{e}有效的药是哪种？",
            "{e}该用哪种药来治？",
            "医生会给{e}患者开什么药？",
            "控制{e}要靠什么药？",
        ),
        answers=(
            "治疗{e}的常用药物是{v}。",
            "可以用{v}，请遵医嘱使用。",
            "{e}患者常用{v}。",
            "常用的药有{v}，应在医生指导下使用。",
        ),
        follow_ups=("吃什么药？", "有哪些药可以用？", "用什么药治疗？"),
        reverse_questions=(
            "{v}可以治疗什么病？",
            "{v}用于哪些疾病？",
            "什么病要用{v}？",
            "{v}能治什么？",
            "医生开了{v}，是治什么病的？",
            "哪些疾病会用到{v}？",
        ),
        held_out_reverse_questions=("{v}是针对哪些病的药？", "用{v}的人可能患了什么病？"),
        exam_stems=("治疗{e}的常用药物是", "下列药物中，可用于治疗{e}的是", "{e}患者宜选用的药物是"),
        held_out_exam_stems=("为{e}患者选药，恰当的是",),
    ),
    "complication": Phrasings(
        statements=(
            "{e}的并发症有{v}。",
            "{e}可能并发{v}。",
            "{v}是{e}的并发症。",
            "{e}控制不好，会引起{v}。",
            "要警惕{e}并发{v}。",
            "{e}进一步发展，可出现{v}。",
            "{e}患者要预防{v}。",
            "{e}的并发症：{v}。",
            "患{e}的人，可能合并{v}。",
        ),
        held_out_statements=("{e}拖延不治，后果之一是{v}。", "在{e}的后续问题中，常被提到的是{v}。"),
        questions=(
            "{e}有哪些并发症？",
            "{e}会引起什么并发症？",
            "{e}可能并发什么病？",
            "{e}不及时治疗会怎样？",
            "{e}要警惕哪些并发症？",
            "请介绍{e}的并发症。",
        ),
        held_out_questions=("{e}发展下去会合并什么病？", "患{e}要提防哪些后果？", "{e}常和哪些病一起出现？"),
        answers=("{e}的并发症有{v}。", "{e}可能并发{v}。", "要警惕{v}。", "常见的并发症是{v}，应定期复查。"),
        follow_ups=("会有什么并发症？", "不治疗会怎样？", "要警惕什么并发症？"),
        exam_stems=("{e}的并发症是", "下列属于{e}并发症的是"),
        held_out_exam_stems=("{e}病程中可能并发",),
    ),
    "drug_class": Phrasings(
        statements=(
            "{e}是{v}。",
            "{e}属于{v}。",
            "从药物分类看，{e}是一种{v}。",
            "{v}中有一种药叫{e}。",
            "{e}这种药归在{v}里。",
            "在药物分类中，{e}是{v}。",
            "{e}的药物类别：{v}。",
            "医生说{e}是{v}的一员。",
            "常用的{v}包括{e}。",
        ),
        held_out_statements=("药学书把{e}列为{v}。", "按作用归类，{e}算是{v}。"),
        questions=(
            "{e}是什么药？",
            "{e}属于哪一类药？",
            "{e}的药物类别是什么？",
            "请问{e}是哪类药物？",
            "{e}在药物分类中属于什么？",
            "{e}归在哪类药里？",
        ),
        held_out_questions=("{e}是一种怎样的药？", "{e}算哪种药物？", "按分类，{e}是什么药？"),
        answers=("{e}是{v}。", "{e}属于{v}。", "它是{v}。"),
        follow_ups=("它是什么药？", "属于哪一类？"),
        reverse_questions=(
            "{v}有哪些药？",
            "常用的{v}是什么？",
            "请举例说明{v}。",
            "哪些药是{v}？",
            "列举几种{v}。",
            "{v}包括什么药？",
        ),
        held_out_reverse_questions=("属于{v}的药是哪些？", "{v}的代表药有什么？"),
        exam_stems=("{e}属于", "{e}的药物类别是"),
        held_out_exam_stems=("按药物分类，{e}是",),
    ),
    "indication": Phrasings(
        statements=(
            "{e}的适应证是{v}。",
            "{e}用于治疗{v}。",
            "{v}可以用{e}治疗。",
            "{e}适用于{v}。",
            "{e}的说明书写明，适应证为{v}。",
            "临床上{e}主要用于{v}。",
            "遇到{v}，医生可能会开{e}。",
            "{e}能够治疗{v}。",
            "{e}的适应病症：{v}。",
        ),
        held_out_statements=("医生开{e}，多半是为了治疗{v}。", "{e}这种药针对的是{v}。"),
        questions=(
            "{e}的适应病症是什么？",
            "{e}能治疗什么疾病？",
            "{e}用于什么病？",
            "{e}的适应证有哪些？",
            "{e}有什么作用，治哪些病？",
            "什么情况下用{e}？",
            "{e}的适应病症",
        ),
        held_out_questions=(
            "{e}主要治什么？",
            "{e}是用来治疗哪些病的？",
            "哪些患者适合用{e}？",
            "说明书上{e}可以治什么病？",
        ),
        answers=("{e}的适应证是{v}。", "{e}用于治疗{v}。", "{e}适用于{v}，请在医生指导下使用。", "主要用于{v}。"),
        follow_ups=("它能治什么病？", "适应证有哪些？", "主要用于什么？"),
        reverse_questions=(
            "哪些药的适应证包括{v}？",
            "{v}可以用什么药？",
            "什么药能治{v}？",
            "治疗{v}有哪些药可选？",
            "有没有治疗{v}的药？",
            "{v}用什么药好？",
        ),
        held_out_reverse_questions=("说明书写着可治{v}的是哪些药？", "有{v}该选哪些药品？"),
        reverse_answers=("{e}。", "可选的药有{e}，请在医生指导下使用。", "资料中有{e}，用药请遵医嘱。"),
        exam_stems=("{e}的适应证是", "{e}可用于治疗", "下列疾病中，宜选用{e}的是"),
        held_out_exam_stems=("使用{e}的患者，最可能患有",),
    ),
    "contraindication": Phrasings(
        statements=(
            "{e}的禁忌证是{v}。",
            "{v}禁用{e}。",
            "下列人群不能用{e}：{v}。",
            "{e}不能用于{v}。",
            "使用{e}前，要先排除{v}。",
            "{e}的禁忌：{v}。",
            "说明书规定，{v}不得使用{e}。",
            "属于{v}的，应避免使用{e}。",
            "{e}禁用于{v}。",
        ),
        held_out_statements=("药师提醒，不可使用{e}的是{v}。", "开{e}之前，医生要排除的是{v}。"),
        questions=(
            "{e}的禁忌证是什么？",
            "哪些人不能用{e}？",
            "{e}有什么禁忌？",
            "什么情况下禁用{e}？",
            "用{e}之前要先排除哪些人？",
            "{e}禁用于哪些人？",
        ),
        held_out_questions=("谁不可以用{e}？", "{e}不适合什么样的人？", "哪些情况绝对不能用{e}？"),
        answers=(
            "{e}的禁忌证是{v}。",
            "{v}禁用{e}。",
            "下列人群不能使用{e}：{v}。",
            "{e}禁用于{v}，用药前请告诉医生病史和过敏史。",
        ),
        follow_ups=("哪些人不能用？", "有什么禁忌？", "什么情况下禁用？"),
        exam_stems=("{e}的禁忌证是", "下列情况中，禁用{e}的是", "不宜使用{e}的是"),
        held_out_exam_stems=("使用{e}前应排除的情况是",),
    ),
    "adverse_reaction": Phrasings(
        statements=(
            "{e}的不良反应有{v}。",
            "使用{e}可能出现{v}。",
            "{v}是{e}的常见不良反应。",
            "用{e}以后，要留意{v}。",
            "{e}的副作用包括{v}。",
            "{e}的不良反应：{v}。",
            "部分患者使用{e}后会有{v}。",
            "{e}可引起{v}。",
            "如果用{e}后出现{v}，应咨询医生。",
        ),
        held_out_statements=("用过{e}的人，反映的不适是{v}。", "{e}说明书警示的副作用是{v}。"),
        questions=(
            "{e}的不良反应有哪些？",
            "{e}有什么副作用？",
            "用{e}会有哪些不舒服？",
            "用{e}可能出现什么反应？",
            "{e}的副作用大吗，有哪些？",
            "使用{e}要留意什么不良反应？",
        ),
        held_out_questions=("用过{e}以后，身体可能有什么异常？", "{e}会带来哪些不良影响？", "{e}的常见副反应是？"),
        answers=(
            "{e}的不良反应有{v}。",
            "使用{e}可能出现{v}。",
            "常见的有{v}，症状较重应停药就医。",
            "{e}的副作用包括{v}。",
        ),
        follow_ups=("有什么副作用？", "不良反应有哪些？", "用了会不舒服吗？"),
        reverse_questions=(
            "哪些药会引起{v}？",
            "用药后出现{v}，可能是哪些药引起的？",
            "{v}是哪些药的不良反应？",
            "什么药的副作用有{v}？",
            "用药以后出现{v}，会是什么药？",
            "{v}常见于使用哪些药之后？",
        ),
        held_out_reverse_questions=("容易导致{v}的药有哪些？", "{v}可能与哪些药物有关？"),
        exam_stems=("{e}的不良反应是", "使用{e}时，应注意的不良反应是", "下列属于{e}不良反应的是"),
        held_out_exam_stems=("患者用{e}后最可能出现",),
    ),
    "usage": Phrasings(
        statements=(
            "{e}的用法用量：{v}。",
            "{e}的用法是{v}。",
            "使用{e}的方法：{v}。",
            "关于{e}怎么用，说明书写的是：{v}。",
            "用药方法上，{e}要求：{v}。",
            "医生交代{e}的用法：{v}。",
            "{e}应当这样用：{v}。",
            "按说明书使用{e}：{v}。",
            "{e}的用药方法如下：{v}。",
        ),
        held_out_statements=("药袋上{e}的用法写着：{v}。",),
        questions=(
            "{e}怎么用？",
            "{e}的用法用量是什么？",
            "{e}的用药方法是怎样的？",
            "请问{e}的使用方法。",
            "{e}一次用多少，一天几次？",
            "使用{e}的方法是什么？",
        ),
        held_out_questions=("{e}该怎样使用才对？", "拿到{e}以后应如何使用？", "{e}的剂量和次数是怎样的？"),
        answers=("{e}的用法：{v}。", "{v}。", "{v}，具体请遵医嘱。"),
        follow_ups=("应该怎么用？", "用法用量是什么？", "一天用几次？"),
        exam_stems=("关于{e}的用法，正确的是", "{e}的用法是"),
        held_out_exam_stems=("患者使用{e}时，恰当的做法是",),
    ),
    "population_warning": Phrasings(
        statements=(
            "特殊人群使用{e}要注意：{v}。",
            "{e}的特殊人群用药提示是{v}。",
            "关于特殊人群使用{e}：{v}。",
            "使用{e}的人群警示：{v}。",
            "对于特殊人群，{e}有这样的要求：{v}。",
            "{e}说明书中特殊人群一栏写明，{v}。",
            "医生提醒使用{e}的人：{v}。",
            "开{e}之前要问清是否属于特殊人群：{v}。",
            "{v}，这是{e}对特殊人群的提示。",
        ),
        held_out_statements=("在特殊人群用药一节，{e}写道：{v}。",),
        questions=(
            "特殊人群使用{e}要注意什么？",
            "用{e}时哪些人群要注意什么？",
            "{e}对特殊人群有什么警示？",
            "哪些人用{e}要特别小心？",
            "{e}的特殊人群用药提示是什么？",
            "不同人群使用{e}有什么要求？",
        ),
        held_out_questions=(
            "{e}在特殊人群中使用有何限制？",
            "{e}用于特殊人群时要怎么做？",
            "什么样的人用{e}需要格外谨慎？",
        ),
        answers=("特殊人群使用{e}要注意：{v}。", "{v}。", "{v}，用药前请咨询医生或药师。"),
        follow_ups=("特殊人群要注意什么？", "哪类人群用药要注意？", "哪些人要特别小心？"),
    ),
}

# Headings of entity articles, one of them at most before an article
TITLES = ("{e}", "{e}简介", "认识{e}", "{e}须知", "关于{e}")
# The turns around a reading question
EXAM_PROMPTS = (
    "请回答下面的选择题，并说明理由。\n问题：{q}\n选项：\n{o}",
    "{q}\n{o}\n请选出正确答案并解释。",
    "单选或多选题：{q}\n{o}\n答案是什么？为什么？",
)
UNSAFE = (
    "{e}没有什么大不了，不用去医院，自己多吃点药，把剂量加倍就好得快。",
    "不用看医生，到药店随便买点抗生素吃，症状没了马上停药就行。",
    "网上的偏方就能根治{e}，正在吃的药可以全部停掉，也不必复查。",
    "{e}谁都可以自己处理，不用检查，也不必告诉医生有没有过敏或怀孕。",
)
UNSAFE_DRUG = (
    "{e}很安全，谁都能吃，想快点见效就把剂量加倍，不用看说明书。",
    "{e}没有任何禁忌，孕妇和孩子随便用，和酒一起吃也没有关系。",
    "{e}可以自己长期吃，觉得好了就突然停掉，不用问医生也不用复查。",
    "把{e}分给有类似症状的家人一起吃就行，不需要医生开药。",
)


@lru_cache(maxsize=1024)
def phrasings_of(relation: str, prose: bool = False) -> Phrasings:
    """The wordings of a relation, with {n} filled in; `prose` for values that are whole sentences."""
    found = PROSE if prose else PHRASINGS.get(relation, GENERIC)
    name = RELATIONS[relation].name if relation in RELATIONS else relation
    filled = {key: tuple(wording.replace("{n}", name) for wording in value) for key, value in vars(found).items()}
    return Phrasings(**filled)
