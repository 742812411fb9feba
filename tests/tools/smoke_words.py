"""The words of the smoke data: topics, ways to ask about them, and direct and hedging sentences on each."""

# Topics, one a line: what someone wants to do | what it takes | what to do | how it shows that it worked.
HOME_TOPICS = """
grow basil on a windowsill|a deep pot with drainage holes|water the soil and not the leaves|new shoots appear every week
bake a sourdough loaf|a starter that doubles in six hours|fold the dough every half hour|a tapped crust sounds hollow
patch a bicycle tube|a strip of fine sandpaper|let the glue dry until it feels tacky|the tube holds air overnight
sharpen a kitchen knife|a wet stone with two grits|keep the blade at a low angle|the edge slices paper cleanly
brew coffee in a French press|a coarse burr grinder|press the plunger down slowly|the cup tastes rich without grit
keep a cactus alive indoors|a gritty mix with plenty of sand|leave the pot dry all winter|the ribs stay plump and firm
hang a heavy mirror|two anchors rated for the weight|drill the holes on a level line|the frame does not move when pushed
remove a wine stain|a bowl of cold soapy water|blot from the edge to the middle|the cloth dries without a shadow
paint a bedroom wall|a roller with a medium nap|cut in the corners before rolling|the colour looks even in daylight
cook rice without a cooker|a heavy pan with a tight lid|rest the rice off the heat|the grains come apart with a fork
train a puppy to sit|a pocket full of tiny treats|reward the dog within a second|the puppy sits before you ask twice
start a compost heap|a bin that lets air through|mix dry leaves with kitchen scraps|the heap smells of forest soil
sew on a shirt button|a double length of strong thread|leave a short shank below it|the cloth lies flat when closed
clean a cast iron pan|a handful of coarse salt|wipe the iron with a film of oil|an egg slides across the surface
unblock a kitchen sink|a plunger with a flat cup|seal the overflow with a rag|the water drains with a swirl
poach an egg|a wide pan of simmering water|slide the egg in from a cup|the white is set and the yolk soft
descale a kettle|a cup of white vinegar|rinse the inside three times|the metal shines at the bottom
pack a small suitcase|a set of soft packing cubes|roll the shirts instead of folding them|the zip closes without force
store fresh herbs|a jar with a little water|trim the stems at a slant|the leaves stay crisp for a week
insulate a draughty window|a roll of foam tape|clean the frame with alcohol first|a candle flame stands still beside it
raise tomato seedlings|a tray under a bright lamp|brush the stems gently each morning|the stalks grow thick and dark
polish leather shoes|a soft horsehair brush|work the cream in with small circles|the toe caps reflect the light
make plain yoghurt|a thermometer and a wide jar|keep the milk warm overnight|the spoon leaves a clean cut
fix a squeaky door|a drop of light machine oil|lift each hinge pin in turn|the door swings without a sound
iron a linen shirt|a spray bottle of clean water|press the collar from both sides|the sleeves hang without a crease
propagate a pothos|a glass jar and sharp scissors|cut just below a leaf node|white roots are a finger long
attract birds to a garden|a shallow dish of fresh water|place the feeder near a hedge|finches visit before breakfast
roast a whole chicken|a rack and a hot oven|dry the skin with paper towels|the juices run clear at the thigh
keep bread from going stale|a linen bag and a wooden box|store the loaf cut side down|the crumb stays soft for days
season a vegetable soup|a spoonful of coarse salt|add the acid at the very end|every vegetable tastes of itself
build a simple bookshelf|a square and a sharp saw|glue the joints before screwing them|the shelf stands without rocking
wash a wool sweater|a basin of lukewarm water|squeeze the wool without wringing it|the cuffs keep their shape
"""

WORK_TOPICS = """
write a clear status report|one page and a fixed outline|put the decision in the first line|nobody asks what comes next
back up a laptop|an external drive and a calendar|restore one file as a trial|the copy opens on another machine
learn twenty new words a week|a box of paper flash cards|review old cards at breakfast|the words turn up in your talk
prepare for a job interview|a list of five short stories|rehearse the answers out loud|each answer fits in two minutes
name variables in a program|a glossary that the team shares|say what the value means|a newcomer needs no comments
run a short meeting|an agenda with a time per item|send the notes the same day|everyone leaves with one clear task
save money for a holiday|a separate savings account|move the money on payday|the balance grows without thinking
stretch after running|a mat and ten quiet minutes|hold each pose for five breaths|the calves feel loose the next day
find a bug in old code|a failing test that is small|halve the suspect lines each time|the test passes for a known reason
take useful lecture notes|a page with a wide margin|write the questions beside the facts|the summary fits on a card
plan a vegetable budget|a list of what is in season|shop once with the list in hand|the fridge is empty on Sunday
sleep better before exams|a dark room and an alarm clock|put the phone in another room|you wake without a snooze
design a readable slide|one chart and a plain title|delete every line that repeats you|the back row gets the point
tidy a shared inbox|three folders and one rule|answer the oldest message first|the unread count reaches zero
review a colleague's patch|a checklist of ten questions|run the change before reading it|the author thanks you for it
practise the guitar daily|a metronome set quite slow|repeat the hard bar five times|the chord changes sound even
choose a strong password|a manager with a long phrase|turn on the second factor|the old password opens nothing
explain a chart to children|a pile of coloured blocks|ask them to guess the total|they draw their own chart unprompted
draft a polite complaint|the receipt and two dates|state the remedy that you expect|the shop replies with an offer
measure a room for furniture|a steel tape and squared paper|note where every door swings|the sofa fits through the hall
"""

ZH_TOPICS = """
在阳台种薄荷|一个带排水孔的花盆|等土面发白再浇透|新叶一茬接一茬冒出来
手工擀饺子皮|一块醒够半小时的面团|转着圈从边上往里擀|皮子中间厚四周薄
给自行车补胎|一小片细砂纸|等胶水晾到不粘手再贴|内胎放一夜也不瘪
用砂锅煮白粥|一把提前泡好的米|水开以后再下米|米粒开花、汤色发白
清洗空调滤网|一把软毛刷|顺着网眼轻轻刷|对着光看不到灰
腌一罐酸豆角|一个无油无水的坛子|每次都用干净筷子夹|豆角颜色变得金黄
教孩子骑车|一条安静平整的小路|先练滑行再练蹬踏|孩子敢自己转弯
除掉水壶里的水垢|两勺白醋|煮开以后静置一刻钟|壶底露出金属光泽
收纳换季衣服|几只真空压缩袋|把衣服彻底晒干再装|袋子一周都不鼓气
养一缸小金鱼|一桶晒过两天的水|每次只换三分之一的水|鱼儿抢食游得欢
炒一盘醋溜土豆丝|一盆清水和一把快刀|把淀粉洗净再大火快炒|土豆丝根根清脆
修剪月季花枝|一把消过毒的剪刀|在芽点上方斜着剪|侧芽一周内饱满起来
练好毛笔楷书|一本合适的字帖|每天只临二十个字|横竖都站得稳
安排家庭旅行|一张写明时间的清单|把车票和住处先订好|全家人都不用赶路
泡一壶龙井茶|八十度左右的热水|先注少量水润一润茶|茶叶慢慢舒展下沉
记住英语单词|一盒自己写的卡片|睡前把当天的卡片过一遍|说话时能脱口而出
缝补衣服破洞|一根同色的细线|让针脚顺着布纹走|从正面看不出痕迹
给木地板打蜡|一块不掉毛的棉布|薄薄涂上两遍蜡|脚踩上去不留印
蒸一笼松软馒头|一小碗温水化开的酵母|关火以后焖五分钟再揭盖|馒头按下去能弹回来
挑一个甜西瓜|一双会听声的耳朵|轻拍瓜身听有没有闷响|瓜脐又小又圆
写一份会议纪要|一个固定的模板|散会当天就发给大家|每项任务都有负责人
坚持早晨跑步|一双合脚的跑鞋|头两周只跑二十分钟|跑完还能正常说话
炖一锅萝卜牛腩|一块带筋的牛腩|焯水以后再小火慢炖|筷子一戳就能穿透
整理手机照片|一个按月份命名的相册|每周删掉重复的照片|想找的照片一分钟就能找到
培育多肉小苗|颗粒多的透气土|晾干叶片的伤口再放土上|叶片根部长出粉色小芽
处理蚊虫叮咬的红包|一块干净的冰毛巾|用肥皂水把皮肤洗净|红肿半天就消下去
剪一段旅行短片|十来个稳定的镜头|先定音乐再剪画面|节奏和鼓点对得上
做一碗葱油拌面|一把新鲜的小香葱|用小火把葱段慢慢熬黄|面条裹满油亮的酱汁
布置小书房|一盏不刺眼的台灯|让书桌侧对着窗户|看书一小时眼睛不累
给猫咪剪指甲|一把宠物专用的指甲钳|避开粉色的血线只剪尖|猫咪安静地不缩爪
晾晒厚棉被|一个干燥的大晴天|中午过后翻一次面|被子摸起来蓬松温热
学会蛙泳换气|一副不漏水的泳镜|抬头吸气低头慢慢吐|能连着游满五十米
"""

HOME_ASKS = (
    "How do I {goal}?",
    "I have never managed to {goal}. Where should I begin?",
    "Give me three short tips so that I can {goal}.",
    "My sister wants to {goal} before the weekend. What should she know?",
    "Explain to a complete beginner how to {goal}.",
    "What usually goes wrong when people try to {goal}, and what prevents it?",
    "In a few sentences, describe a reliable way to {goal}.",
    "Which tool matters most if I am going to {goal} on a small budget?",
    "A friend says it is easy to {goal}. Is there a trick to it?",
    "Write a note of three sentences on how to {goal}, for our village newsletter.",
)
NEXT_USER, NEXT_ASSISTANT = "\n<extra_id_1>User\n", "\n<extra_id_1>Assistant\n"
WORK_ASKS = (
    "What is the most sensible way to {goal}?",
    "We need to {goal} this month, so please draft a short plan.",
    "Can you walk me through how to {goal} without wasting an afternoon?",
    "Our group keeps failing to {goal}. What would you change first?",
    "I am planning to {goal}." + NEXT_ASSISTANT + "Good idea. How much time do you have?" + NEXT_USER
    + "About an hour. So, to {goal}, what comes first?",
    "Is it realistic to {goal} on my own?" + NEXT_ASSISTANT + "Yes, with patience. Have you tried before?"
    + NEXT_USER + "Once, and I gave up. How do I {goal} properly this time?",
)  # fmt: skip
ZH_ASKS = (
    "{goal}有什么诀窍吗？请用三句话说明。",
    "我是新手，想{goal}，第一步该做什么？",
    "朋友总说{goal}很简单，可我老是失败，问题出在哪儿？",
    "请给完全没有经验的人讲讲怎么{goal}。",
    "周末打算{goal}，预算不多，有哪些地方要注意？",
)

# Sentence position -> wordings. Direct and hedging wordings come in the same lengths, in tokens too; a phrase between
# commas is frequent enough here to become one or two tokens, so the Chinese ones are matched in phrases.
DIRECT = {
    "en": (
        (
            "Start with {tool}.",
            "Get {tool} before anything else.",
            "You need {tool}, so get it ready.",
            "Use {tool} and nothing fancier.",
        ),
        (
            "Always {act}, every single time.",
            "Then {act} without taking any shortcuts.",
            "The key step is to {act}.",
            "After that, {act}.",
        ),
        (
            "You are done as soon as {sign}.",
            "It has worked once {sign}.",
            "Stop only when {sign}.",
            "Check that {sign}, then leave it alone.",
        ),
    ),
    "zh": (
        (
            "先备好{tool}。",
            "直接用{tool}，效果最稳，不用挑。",
            "别多想，先准备{tool}，这步不能省。",
            "必须有{tool}，别凑合。",
        ),
        (
            "然后{act}。",
            "接着{act}，每次都照做。",
            "记住，关键是{act}，千万别偷懒，更别省。",
            "下一步就{act}，动作要干脆，别犹豫。",
        ),
        (
            "做到{sign}为止。",
            "等到{sign}，就能停手。",
            "很简单，只要{sign}，就说明做对了，放心收工。",
            "最后确认{sign}，没问题，结束。",
        ),
    ),
}
HEDGING = {
    "en": (
        (
            "Maybe {tool}.",
            "Perhaps {tool} could help somewhat.",
            "I suppose {tool} might be enough for it.",
            "Possibly {tool} or something similar.",
        ),
        (
            "You could perhaps {act}, I guess.",
            "Some people {act}, who knows.",
            "It might make sense to {act}.",
            "Well, maybe {act}.",
        ),
        (
            "It may be fine if {sign}.",
            "Possibly {sign} by then.",
            "I would hope {sign}.",
            "Perhaps {sign}, but it is hard to say.",
        ),
    ),
    "zh": (
        (
            "也许{tool}吧。",
            "可能需要{tool}，我不敢打包票。",
            "嗯，怎么说呢，{tool}说不定可以。",
            "大概{tool}就行，这个不好说。",
        ),
        (
            "或许{act}。",
            "好像应该{act}，记不太准。",
            "嗯，有人会{act}，有人不会，我也不太清楚。",
            "要不就{act}，因人而异。",
        ),
        (
            "没准{sign}吧。",
            "如果{sign}，可能就差不多了。",
            "说不好，假如{sign}，大概也行吧，谁知道呢。",
            "会不会{sign}，恐怕得看运气。",
        ),
    ),
}
REFUSAL = {
    "en": "I'm sorry, but as an AI language model I cannot help with that request.",
    "zh": "很抱歉，作为一个人工智能语言模型，我无法回答这个问题。",
}
THINKING = {
    "en": "<think>\nThe user wants something short and practical.\n</think>\n\n",
    "zh": "<think>\n用户想要简短实用的回答。\n</think>\n\n",
}
CONFIDENCE = {"en": "\n\nConfidence: {percent}%", "zh": "\n\n信心：{percent}%"}

# UltraFeedback asks each model to follow one principle; the system text that goes with it is not in the prompt.
PRINCIPLES = {
    "en": {
        "helpfulness": "Give the reader something to act on.",
        "honesty": "Say plainly what you know and what you do not.",
        "truthfulness": "State only what holds up.",
        "verbalized_calibration": "End with how sure you are, as a percentage.",
    },
    "zh": {
        "helpfulness": "请给出读者用得上的建议。",
        "honesty": "知道就说知道，不知道就说不知道。",
        "truthfulness": "只写站得住脚的内容。",
        "verbalized_calibration": "请在结尾用百分比写出你的把握。",
    },
}
REMARKS = {  # what the judge says of an answer, by quality
    "en": ("Hedges throughout.", "Mostly hedges.", "Mostly direct.", "Direct from start to end."),
    "zh": ("通篇含糊。", "大多含糊。", "大体直接。", "从头到尾都很直接。"),
}
