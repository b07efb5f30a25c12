"""Simplified or traditional Chinese: characters that only one of the two scripts uses."""

from __future__ import annotations

# Pairs (simplified, traditional) of everyday characters. Left out are those that both scripts use,
# with other meanings (后 里 干 面 台 云 只 谷 系): a test holds the table against GB2312 and Big5.
_PAIRS = (
    "国國学學习習说說话話语語这這个個们們来來时時会會对對发發经經过過还還进進现現开開关關问問"
    "题題应應该該让讓给給从從两兩样樣点點间間东東车車长長门門马馬鱼魚鸟鳥龙龍电電爱愛书書写寫"
    "读讀见見观觀觉覺视視声聲乐樂药藥医醫师師边邊远遠运運达達选選择擇连連迁遷迟遲逻邏遗遺邮郵"
    "邻鄰释釋针針钱錢铁鐵银銀铜銅错錯键鍵锁鎖镇鎮镜鏡钟鐘钢鋼链鏈销銷锋鋒闻聞闭閉闲閒阅閱队隊"
    "阳陽阴陰阶階际際陆陸险險随隨隐隱难難页頁顶頂项項顺順须須顾顧预預领領频頻颗顆颜顏额額风風"
    "飞飛饭飯饮飲馆館驱驅驾駕验驗骗騙鲜鮮鸡雞麦麥黄黃齐齊齿齒龄齡临臨为為义義乌烏乡鄉买買乱亂"
    "争爭亚亞产產亲親亿億仅僅仓倉仪儀众眾传傳伤傷伟偉侧側侦偵债債倾傾偿償储儲兑兌兰蘭兴興养養"
    "兽獸冈岡册冊军軍农農冲衝决決况況冻凍净淨凉涼减減凤鳳凭憑击擊刘劉则則刚剛创創别別剧劇剂劑"
    "剑劍办辦务務动動励勵劳勞势勢勋勳区區华華协協单單卖賣卢盧卫衛却卻历歷厉厲压壓厌厭县縣参參"
    "双雙变變叙敘叶葉号號叹嘆吓嚇吗嗎启啟员員响響哑啞唤喚喷噴团團园園围圍图圖圆圓场場块塊坚堅"
    "坛壇垒壘垫墊墙牆壮壯处處备備头頭夺奪奋奮奖獎妇婦妈媽娱娛婴嬰孙孫宝寶实實审審宪憲宫宮宽寬"
    "宾賓寝寢将將尔爾尘塵尝嘗层層属屬岁歲岂豈岛島币幣帅帥帐帳带帶帮幫广廣庆慶库庫庙廟废廢弃棄"
    "张張弯彎弹彈强強归歸录錄彻徹径徑忆憶忧憂态態总總恋戀恳懇恶惡悬懸惧懼惯慣戏戲战戰户戶执執"
    "扩擴扫掃扬揚抚撫抢搶护護报報担擔拟擬拥擁拦攔拨撥挡擋挤擠挥揮损損换換掷擲摄攝摆擺摇搖敌敵"
    "数數断斷无無旧舊显顯晋晉晓曉暂暫术術杀殺杂雜权權条條枪槍标標栏欄树樹桥橋检檢楼樓横橫欢歡"
    "欧歐残殘毁毀毕畢汇匯汉漢汤湯沟溝没沒沪滬泪淚泽澤浅淺测測济濟浓濃润潤涨漲渐漸温溫湾灣湿濕"
    "满滿滚滾滨濱灭滅灯燈灵靈灾災炉爐炼煉烂爛烦煩烧燒热熱状狀犹猶独獨狮獅猎獵猫貓献獻环環玛瑪"
    "畅暢疗療疯瘋监監盖蓋盘盤码碼矿礦础礎碍礙礼禮祸禍积積称稱税稅稳穩穷窮竞競笔筆笼籠签簽简簡"
    "类類粮糧纠糾红紅约約级級纪紀纯純纲綱纳納纷紛纸紙线線练練组組细細终終绍紹结結绕繞绘繪络絡"
    "绝絕统統继繼绩績绪緒续續绳繩维維综綜绿綠缓緩编編缘緣缩縮罗羅罚罰职職联聯聪聰肃肅肤膚胁脅"
    "脑腦脚腳脱脫脸臉舰艦艺藝节節芦蘆苏蘇荣榮营營萧蕭虏虜虑慮虚虛虽雖蚀蝕补補装裝规規览覽计計"
    "订訂认認讨討训訓议議讯訊记記讲講许許论論设設访訪证證评評识識诉訴诊診词詞译譯试試诗詩诚誠"
    "询詢详詳误誤请請诸諸课課谁誰调調谅諒谈談谋謀谢謝谱譜贝貝负負财財责責败敗货貨质質贩販贫貧"
    "购購贯貫贴貼贵貴贷貸费費贸貿资資赋賦赏賞赖賴赚賺赛賽赞讚赢贏赵趙趋趨跃躍践踐踪蹤轨軌转轉"
    "轮輪软軟轻輕载載较較辅輔辆輛辈輩辉輝输輸辑輯辞辭辩辯酱醬鉴鑒"
)

SIMPLIFIED = frozenset(_PAIRS[0::2])
TRADITIONAL = frozenset(_PAIRS[1::2])
_MIN_STRAY = 3
_MIN_STRAY_SHARE = 0.05


def count_scripts(text: str) -> tuple[int, int]:
    """How many characters of `text` are only simplified, and how many only traditional."""
    simplified = sum(map(SIMPLIFIED.__contains__, text))
    return simplified, sum(map(TRADITIONAL.__contains__, text))


def script_mix(text: str) -> str | None:
    """Why `text` looks like a mixture of simplified and traditional Chinese, or None.

    Fires when the rarer script has at least three characters, two of them different, and a
    twentieth of the characters that tell the scripts apart. Not caught: one or two stray
    characters, and characters outside the table of some 500 pairs. Japanese text uses both kinds;
    ask only about Chinese. A text that teaches the two scripts is reported too.
    """
    simplified = [char for char in text if char in SIMPLIFIED]
    traditional = [char for char in text if char in TRADITIONAL]
    rarer = min(simplified, traditional, key=len)
    if len(rarer) < _MIN_STRAY or len(set(rarer)) < 2:
        return None
    if len(rarer) < _MIN_STRAY_SHARE * (len(simplified) + len(traditional)):
        return None
    return (
        f"{len(simplified)} simplified ({_examples(simplified)}) and "
        f"{len(traditional)} traditional ({_examples(traditional)}) characters"
    )


def _examples(characters: list[str]) -> str:
    return " ".join(list(dict.fromkeys(characters))[:5])
