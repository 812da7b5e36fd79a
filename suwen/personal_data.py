"""Personal data in Chinese medical text: found, counted and masked by kind.

What is recognised: resident IDs of 18 digits with a valid birth date and checksum (GB 11643-1999); mobile and land-line
numbers; e-mail addresses; QQ and WeChat numbers, record numbers, addresses and birth dates behind their labels; names
behind their labels (姓名：, 联系人：) or before their sex or age (患者张某，男). Names begin with one of the common
surnames. A name in running text is not found: that takes a model, and its mistakes.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterator
from typing import NamedTuple

MASKS = {
    "resident_id": "[身份证号]",
    "phone": "[电话]",
    "email": "[邮箱]",
    "account": "[账号]",
    "record_number": "[编号]",
    "address": "[地址]",
    "birth_date": "[出生日期]",
    "name": "[姓名]",
}
SURNAMES = (
    "赵钱孙李周吴郑王冯陈褚卫蒋沈韩杨朱秦尤许何吕施张孔曹严华金魏陶姜戚谢邹喻柏窦章苏潘葛奚范彭郎鲁韦昌马苗凤方俞任袁柳鲍史唐费廉"
    "岑薛雷贺倪汤滕殷罗毕郝邬安常乐于时傅皮卞齐康伍余元卜顾孟平黄穆萧尹姚邵湛汪祁毛禹狄米贝明臧计伏成戴谈宋庞熊纪舒屈项祝董梁杜阮"
    "蓝闵席季麻强贾路娄江童颜郭梅盛林刁钟徐邱骆高夏蔡田樊胡凌霍虞万支柯管卢莫房裘缪解应宗丁宣邓单洪包诸左石崔吉龚程邢裴陆荣翁荀"
    "羊惠甄曲家封储靳段富巫乌焦巴牧谷车侯全班秋仲宫宁仇栾甘厉祖武符刘景詹龙叶司黎薄白怀蒲从卓蔺屠池乔闻党翟谭申冉郦桑桂牛寿边"
    "燕冀尚农温庄晏柴阎习容向古易慎戈廖庾居衡步都耿满匡文寇广东欧沃利蔚越隆师巩聂晁勾敖融冷辛阚那简饶曾沙养关查游权代肖闫付"
)
COMPOUND = "欧阳|司马|上官|诸葛|东方|皇甫|尉迟|公孙|慕容|令狐|司徒|端木|夏侯"
NAME = rf"(?:(?:{COMPOUND})[\u4e00-\u9fff]{{1,2}}|[{SURNAMES}][\u4e00-\u9fff某]{{1,2}})"
# Words that begin like a name and stand behind the same labels
NOT_NAMES = re.compile(
    r"不详|未知|保密|匿名|同上|高血[压糖脂]|黄疸|白[带细血]|应[该当]|常[规见]|任[何意]|全[部体]|成[年人]|时[间候]|平[时常]|关[节于]"
)

# Full width as half width, character by character, so that places stay the same
FULL_WIDTH = re.compile("[\uff10-\uff19\uff20-\uff3a\uff41-\uff5a]")
HALF_WIDTH = {code: code - 0xFEE0 for code in (*range(0xFF10, 0xFF1A), *range(0xFF20, 0xFF3B), *range(0xFF41, 0xFF5B))}
# Cheap to look for, and rare: what may hold a number, and the colon behind a label
DIGIT_RUN = re.compile(r"(?:\+(?=86))?[0-9](?:[- \uff0d]?[0-9Xx]){9,}")
COLON = re.compile(r"[:：] ?")
NUMBER = re.compile(
    r"(?P<resident_id>[1-9]\d{5}(?:19|20)\d{9}[\dXx])"
    r"|(?P<phone>(?:\+?86[- ]?)?1[3-9]\d[- ]?\d{4}[- ]?\d{4}"
    r"|0\d{2,3}[- \uff0d]\d{7,8}|400[- \uff0d]?\d{3,4}[- \uff0d]?\d{3,4})"
)
EMAIL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._%+-]*@[A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)+")
ACCOUNT = re.compile(
    r"(?:QQ|qq|微信|微 信)(?:群|号|号码)?\s*[:：是]?\s*(?P<account>[A-Za-z0-9_-]{5,20})(?![A-Za-z0-9])"
)
RECORD = re.compile(
    r"(?:住院号|门诊号|病案号|病历号|就诊卡号|医保号|医保卡号|登记号)\s*[:：]?\s*(?P<record_number>[A-Za-z]{0,3}\d{4,20})"
)
PATIENT = re.compile(
    rf"(?:患者|病人|患儿|家属)\s*[:：]?\s*(?P<name>{NAME})(?=\s*[，,、 ]\s*(?:男|女|\d{{1,3}}\s*[岁月天]))"
)
LABEL_ENDS = frozenset("名人字师生址期日 ")
# What stands behind a label and its colon
VALUES = (
    (
        "name",
        re.compile(r"(?:姓\s*名|联系人|签\s*名|签字|(?:主治|主管|经治|接诊|主任)医[师生])\s*$"),
        re.compile(rf"{NAME}(?![\u4e00-\u9fff])"),
    ),
    ("address", re.compile(r"(?:住址|联系地址|家庭地址)\s*$"), re.compile(r"[^\s，,。；;]{4,40}")),
    (
        "birth_date",
        re.compile(r"(?:出生日期|出生年月日?|生日)\s*$"),
        re.compile(r"\d{4}[-/.年]\d{1,2}(?:[-/.月]\d{1,2}日?)?"),
    ),
)


class Finding(NamedTuple):
    kind: str  # a key of MASKS
    start: int
    end: int


def is_resident_id(text: str) -> bool:
    """Whether 18 characters are a resident ID: a real birth date, and the checksum of ISO 7064 MOD 11-2."""
    try:
        born = datetime.date(int(text[6:10]), int(text[10:12]), int(text[12:14]))
    except ValueError:
        return False
    total = sum(int(digit) * (2 ** (17 - place) % 11) for place, digit in enumerate(text[:17]))
    return born <= datetime.date.today() and "10X98765432"[total % 11] == text[17].upper()


def find_personal_data(text: str) -> list[Finding]:
    """Everything recognised, in order, without overlap."""
    if FULL_WIDTH.search(text):
        text = text.translate(HALF_WIDTH)
    found = sorted(_candidates(text), key=lambda item: (item.start, -item.end))
    kept: list[Finding] = []
    for item in found:
        if not kept or item.start >= kept[-1].end:
            kept.append(item)
    return kept


def _candidates(text: str) -> Iterator[Finding]:
    for run in DIGIT_RUN.finditer(text):
        match = NUMBER.fullmatch(run[0])
        if match and (match.lastgroup == "phone" or is_resident_id(run[0])):
            yield Finding(str(match.lastgroup), *run.span())
    if "@" in text:
        yield from (Finding("email", *match.span()) for match in EMAIL.finditer(text))
    for pattern in (ACCOUNT, RECORD, PATIENT):
        for match in pattern.finditer(text):
            kind = str(match.lastgroup)
            if kind != "name" or not NOT_NAMES.match(match[kind]):
                yield Finding(kind, *match.span(kind))
    for colon in COLON.finditer(text):
        if text[colon.start() - 1 : colon.start()] not in LABEL_ENDS:
            continue
        label = text[max(0, colon.start() - 8) : colon.start()]
        for kind, before, after in VALUES:
            value = before.search(label) and after.match(text, colon.end())
            if value and not (kind == "name" and NOT_NAMES.match(value[0])):
                yield Finding(kind, *value.span())


def mask_personal_data(text: str, findings: list[Finding] | None = None) -> str:
    """The text with each finding replaced by the mask of its kind; masking twice changes nothing more."""
    findings = find_personal_data(text) if findings is None else findings
    for kind, start, end in reversed(findings):
        text = text[:start] + MASKS[kind] + text[end:]
    return text
