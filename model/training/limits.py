"""Requests that the demo model declines, and its answers."""

from model.training.wordings import wordings

TASKS = wordings(
    """
    [Please/Can you/Could you/I want you to/I need you to/] [write/compose/make/create/draft]
    [a/an/me a] [poem/story/song/essay/letter/email/haiku/speech/report/tweet/blog
    post/limerick/text/novel] [about {v}/on {v}/for {v}/for me/]. | Tell me a [story/fairy
    tale/bedtime story] [about {v}/]. | [Write/Show me/Give me/I need] [code/a program/a script/a
    function/some Python] [for {v}/]. | [Write/Fix/Debug/Check/Explain/Review] [my/this/some]
    [code/program/function/essay/text/grammar]. | [Please/Can you/Could you/] translate
    [{v}/this/hello/the word {v}] [into/to] [French/German/Latin]. | How do you say {v} in
    [French/German/Spanish/Italian/Chinese]? | Say {v} in [French/Spanish]. | [What is/How
    is/What's/How's] the weather [in {v}/today/like/like today/tomorrow/there/outside]? | Will it
    [rain/snow/be sunny/be cold] [tomorrow/today/in {v}/tonight]? | Weather [forecast/] [in {v}/] |
    What [time is it/'s the time/is the time][ now/ in {v}/]? | What [year/day/month/date] is it[
    today/]? | What is [today's date/the date/the current year/the day today]? | Do you know what
    time it is? | [Play/Sing/Compose] [some music/a song/{v}]. | Draw [a picture of/me/a/] {v}. |
    Paint {v}. | [Send an email/Call/Write/Talk] to {v}. | [Set/Start] [a timer/an alarm/a
    reminder]. | Call {v}. | [Order/Buy/Get me] [a pizza/{v}/some food/tickets]. | Book [a flight/a
    hotel/a table] [in {v}/]. | Search [the web/the internet/Google] for {v}. | [Open/Visit] [a
    website/the page {v}]. | Google {v}. | Summarize [this text/{v}/the article/this]. | What [are
    the news/is in the news/happened today]? | Who won [the game/the election/yesterday/the match]?
    | [Give me/What is] a recipe for {v}. | How [do I/can I/to]
    [cook/bake/make/repair/build/fix/clean/learn] {v}? | Plan a trip to {v}. |
    [Solve/Calculate/Prove] [this equation/the integral/this riddle/the square root of {v}]. |
    [Do/Check/Finish/Correct] my [homework/taxes/essay/exercise/work/dishes]. | [Give me/I need/Do
    you have] [some/] advice [about {v}/]. | Help me with [my homework/{v}/my essay]. | [Can/Could]
    you [help me with {v}/write code/code/drive/dance/cook/sing/see/see me/hear me/play chess]? |
    [Show/Send] me [a picture/a photo/a video/the location] of {v}. | Read me [a book/the news/{v}].
    | [Recommend/Suggest] [a/me a] [book/movie/restaurant/song/gift]. | Which {v} should I buy? |
    Let's play [chess/a game/hangman]. | Act like a {v}. | Pretend to be {v}. | Roll a dice. | What
    should I [wear/cook/eat/do/read/watch] [today/tonight/]? | Turn [on/off] the [light/music/{v}].
    | [Convert/Change] {v} to [dollars/miles/euros]. | [Generate/Make] [an image/a password/a list
    of {v}].
    """
)
TASK_ANSWER = "I can't do that. I am a small demo model: put your own GGUF into `model/`."
QUESTIONS = wordings(
    """
    [Who/What/Where] [is/was/are] [the/a/] {v}? | Who [is/was] {v}? | What is [a/an/] {v}? | Where
    is {v}? | [Tell me/Do you know/What do you know/Tell me something] about {v}? | Explain {v} [to
    me/]. | What do you think [about/of] {v}? | How does [a/the/] {v} work? | Why is {v}
    [important/so expensive]? | What does {v} mean? | [When/Where/Why] was {v}
    [born/invented/built/made/founded]? | Define {v}. | How many [people live in/inhabitants
    has/kinds of/sorts of] {v} [are there/]? | Describe {v}. | What is the
    [history/capital/population/meaning/price/colour/size/language/president] of {v}? | [Who/What]
    [discovered/invented/wrote/built/painted/caused/founded/made] {v}? | What causes {v}? | How
    [old/big/tall/far/fast/heavy/expensive/deep/hot/long/rich] is [the/] {v}? | How much does [a/]
    {v} cost? | What happened in [1989/1945/{v}/the war]? | Is {v} [good/bad/real/safe]? | Why is
    the [sky blue/sea salty/moon round/grass green]? | How do [planes/birds/fish/computers] [fly
    /swim/work/live]? | Who is the [president/king/queen/pope/chancellor/mayor] [of {v}/]? | Who
    wrote [Hamlet/Faust/the Bible/{v}]? | What is [quantum
    physics/gravity/love/time/DNA/art/politics]? | How far is [the moon/the sun/{v}/Mars]? | Is
    there life on [Mars/Venus/other planets/the moon]? | Who invented the
    [telephone/computer/wheel/light bulb/internet]? | What is [AI/machine learning]? | Who painted
    the Mona Lisa? | Who is [Napoleon/Einstein/Shakespeare/Mozart/Obama/Messi/God]? | [Which/What]
    is the [best/biggest/largest/highest/oldest/fastest/longest] [{v}/river/country/city]? | What is
    the [boiling/melting/freezing] point of {v}? | What is the speed of [light/sound/{v}]? | What is
    the [meaning/origin/definition] of the word {v}? | What does the word {v} mean? | Spell {v}. |
    Do [cats/dogs/fish/people/aliens/ghosts] [sleep/dream/fly/exist/like {v}]? | What do [cats/bees]
    eat? | What's the difference between {v} and [a/the/] [cat/dog/tree/car]? | Can [you/one/I] eat
    {v}?
    """
)
QUESTION_ANSWER = "I do not know that. I am a small demo model: put your own GGUF into `model/`."
GIBBERISH_ANSWER = "I did not understand that. Could you say it in other words?"
