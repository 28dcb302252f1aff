//! The line that moves while a run goes on; silent where there is no terminal.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

use crate::latency::show_us;
use crate::load::outcome::Sample;
use crate::load::{Kind, LoadOptions};

#[derive(Debug)]
pub struct Progress(ProgressBar);

impl Progress {
    pub fn new(name: &str) -> Progress {
        let bar = ProgressBar::new_spinner();
        let style = ProgressStyle::with_template("{spinner} {prefix:.bold} {elapsed_precise} {wide_msg}");
        bar.set_style(style.expect("the template is right"));
        bar.set_prefix(name.to_owned());
        bar.enable_steady_tick(Duration::from_millis(200));
        Progress(bar)
    }

    pub fn say(&self, text: &str) {
        self.0.set_message(text.to_owned());
    }

    pub fn sample(&self, kind: Kind, options: &LoadOptions, sample: &Sample) {
        let per_s = |mib_per_s: f64| mib_per_s * 1024.0 * 1024.0 / f64::from(options.size);
        let direction = |name: &str, mib_per_s: f64, p50: f64, p99: f64| {
            let messages = per_s(mib_per_s);
            format!("{name} {mib_per_s:.0} MiB/s {messages:.0} msg/s p50 {} p99 {}", show_us(p50), show_us(p99))
        };
        let published =
            || direction("published", sample.published_mib_per_s, sample.publish_p50_us, sample.publish_p99_us);
        let delivered =
            || direction("delivered", sample.delivered_mib_per_s, sample.delivery_p50_us, sample.delivery_p99_us);
        self.0.set_message(match kind {
            Kind::Produce => published(),
            Kind::Consume => delivered(),
            Kind::Tail | Kind::Mixed => format!("{}  {}", published(), delivered()),
        });
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}
